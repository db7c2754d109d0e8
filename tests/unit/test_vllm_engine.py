"""vLLM for real, on a CPU: the engine's process, the generator on it, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_generations import prompts_of, same
from tiny_training import VOCABULARY, make_config, make_model

from dataflex_pipeline.errors import ConfigError, DataflexError, UserError
from dataflex_pipeline.generate import Prompt
from dataflex_pipeline.generate.settings import (
    GenerationSettings,
    context_of,
    endings,
    model_settings,
)
from dataflex_pipeline.generate.vllm import VllmGenerator
from dataflex_pipeline.vllm.engine import VllmEngine, require_vllm, vllm_installed
from dataflex_pipeline.vllm.process import WorkerError, WorkerProcess, environment
from dataflex_pipeline.vllm.worker import lora_options

with_vllm = pytest.mark.skipif(not vllm_installed(), reason="vLLM is not installed")
END = 2
SMALL = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory_bytes": 32 << 20}


@pytest.fixture(scope="module")
def policy(one_thread, tmp_path_factory):
    """A tiny random model with heads of 32, which vLLM can do on a CPU, and an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    make_model(folder / "model")
    known = AutoConfig.from_pretrained(folder / "model")
    known.update({"hidden_size": 64, "head_dim": 32})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(known).save_pretrained(folder / "model")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    return folder / "model", folder / "adapter"


def make_generator(policy, heard=None, **changes):
    config = make_config(policy[0])
    known = model_settings(config)
    tokenizer, end_ids, end_text = endings(config, known, print)
    made = GenerationSettings(
        max_new_tokens=12,
        temperature=0.9,
        end_ids=end_ids,
        end_text=end_text,
        context=context_of(known),
        batch=8,
        tokenizer=tokenizer,
    )
    say = print if heard is None else heard.append
    return VllmGenerator(config, policy[1], replace(made, **changes), 40, say)


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(24, longest=40)


@pytest.fixture(scope="module")
def opened(policy):
    """An open generator, and what it said."""
    heard = []
    with make_generator(policy, heard) as generator:
        worker = generator._engine._worker
        assert alive_in_group(worker.pid)
        yield generator, heard, worker.pid
    assert not alive_in_group(worker.pid), "a normal exit leaves nothing running"


@pytest.fixture(scope="module")
def drawn(opened, prompts):
    return opened[0].generate(prompts)


def alive_in_group(group):
    """Processes of a process group that still run."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def wait_until(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


@with_vllm
class TestGenerator:
    def test_logprobs_agree_with_transformers_and_the_adapter(self, policy, prompts, drawn):
        import torch

        from dataflex_pipeline.models.base import load_for_scoring

        model = load_for_scoring(make_config(policy[0]), policy[1], "cpu")
        base = load_for_scoring(make_config(policy[0]), None, "cpu")
        apart = 0.0
        for prompt, each in zip(prompts, drawn, strict=True):
            ids = torch.tensor([[*prompt.token_ids, *each.token_ids]])
            sums = []
            for which in (model, base):
                with torch.no_grad():
                    logprobs = torch.log_softmax(which(ids).logits[0, :-1].double(), -1)
                of_tokens = logprobs.gather(1, ids[0, 1:, None])[len(prompt.token_ids) - 1 :]
                sums.append(float(of_tokens.sum()))
            assert each.logprob == pytest.approx(sums[0], abs=1e-4)
            apart = max(apart, abs(sums[0] - sums[1]))
        assert apart > 1, "without the adapter the numbers are other ones"

    def test_ends_and_limits(self, drawn):
        assert {each.finish for each in drawn} == {"stop", "length"}
        for each in drawn:
            assert (each.token_ids[-1] == END) == (each.finish == "stop")
            assert each.finish == "stop" or len(each.token_ids) == 12
            assert each.text.split() == [f"w{token}" for token in each.token_ids if token > END]

    def test_order_batch_and_company_do_not_matter(self, opened, prompts, drawn):
        generator = opened[0]
        assert generator.generate(prompts) == drawn, "the same call again is equal to the last bit"
        assert same(generator.generate(prompts[::-1])[::-1], drawn)
        assert same(generator.generate(prompts[7:8]), drawn[7:8])

    def test_a_sample_has_a_stream_of_its_own(self, opened):
        texts = [each.text for each in opened[0].generate([Prompt([5, 9, 11], seed) for seed in (7, 8, 7)])]
        assert texts[0] == texts[2] != texts[1]

    def test_more_prompt_tokens_than_a_step_takes(self, opened):
        """A prompt read in two steps has its generator set back, which a CPU's cannot be."""
        rng = np.random.default_rng(3)
        many = [Prompt(rng.integers(3, VOCABULARY, 40).tolist(), seed) for seed in range(200)]
        assert len(opened[0].generate(many)) == 200

    def test_what_was_chosen_for_a_cpu_is_said(self, opened):
        assert len(opened[1]) == 1
        assert "enforce_eager True" in opened[1][0]
        assert "kv_cache_memory_bytes" in opened[1][0]

    @pytest.mark.slow
    def test_a_restart_draws_the_same_and_a_refused_request_leaves_nothing_running(
        self, policy, opened, prompts, drawn
    ):
        refused = pytest.raises(DataflexError, match="failed while it was asked to generate")
        with refused as caught, make_generator(policy, batch=5) as again:
            assert same(again.generate(prompts[::-1])[::-1], drawn)
            group = again._engine._worker.pid
            again.generate([Prompt(list(range(3, 63)), 1)])
        assert not alive_in_group(group)
        assert "52" in caught.value.why, "the engine holds prompts of 40 tokens and 12 more"
        assert "Or set nice.generator: transformers." in caught.value.fix
        assert opened[0].generate(prompts[:1])[0].token_ids == drawn[0].token_ids, "the other one still runs"

    def test_temperature_0_is_greedy_generate_of_transformers(self, policy, opened, prompts):
        import torch

        from dataflex_pipeline.models.base import load_for_scoring

        model = load_for_scoring(make_config(policy[0]), policy[1], "cpu")
        greedy = make_generator(policy, temperature=0)
        greedy._engine = opened[0]._engine
        made = greedy.generate(prompts)
        for prompt, each in zip(prompts, made, strict=True):
            ids = torch.tensor([prompt.token_ids])
            expected = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=END,
                pad_token_id=0,
            )
            assert list(each.token_ids) == expected[0, ids.shape[1] :].tolist()


LONG = """
import json, sys
from dataflex_pipeline.vllm.engine import VllmEngine
with VllmEngine("generate", sys.argv[1], json.loads(sys.argv[2])) as engine:
    print(engine._worker.pid, flush=True)
    sampling = {"max_tokens": 50, "ignore_eos": True}
    while True:
        engine.generate([[5, 6, 7]] * 200, [sampling] * 200)
"""


@with_vllm
@pytest.mark.slow
class TestProcess:
    def test_it_dies_with_a_parent_that_is_killed_while_it_generates(self, policy):
        parent = subprocess.Popen(
            [sys.executable, "-c", LONG, str(policy[0]), json.dumps(SMALL)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            group = int(parent.stdout.readline())
            assert alive_in_group(group)
            time.sleep(0.5)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
        assert wait_until(lambda: not alive_in_group(group))

    def test_it_dies_with_a_parent_that_is_killed_while_it_loads(self, policy):
        parent = subprocess.Popen(
            [sys.executable, "-c", LONG, str(policy[0]), json.dumps(SMALL)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert wait_until(lambda: psutil.Process(parent.pid).children(), 60)
            group = psutil.Process(parent.pid).children()[0].pid
            time.sleep(1.0)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.wait()
        assert wait_until(lambda: not alive_in_group(group))

    def test_an_option_that_vllm_does_not_know(self, policy):
        with pytest.raises(DataflexError, match="did not start") as caught:
            VllmEngine("generate", str(policy[0]), SMALL | {"no_such_option": 1}).__enter__()
        assert "no_such_option" in caught.value.why
        assert "no_such_option" in caught.value.fix
        assert max(len(line) for line in caught.value.fix.splitlines()[1:]) < 320


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Start some code of ours in the place of the worker."""

    def start(code):
        (tmp_path / "stand_in.py").write_text("import json, subprocess, sys, time\n" + code)
        monkeypatch.setattr("dataflex_pipeline.vllm.process.WORKER", "stand_in")
        return WorkerProcess(os.environ | {"PYTHONPATH": str(tmp_path)})

    return start


HALF = """
sys.stdin.readline()
print(json.dumps({"shape": [2, 3]}), "half", sep=chr(10))
print("a", "b" * 999, sep=chr(10), file=sys.stderr)
sys.exit(3)
"""
WITH_A_CHILD = """
child = subprocess.Popen(["sleep", "60"])
sys.stdin.readline()
print(json.dumps({"child": child.pid}), flush=True)
sys.stdin.readline()
"""
WHOLE = """
import numpy
sys.stdin.readline()
print(json.dumps({"shape": [500, 300]}), flush=True)
sys.stdout.buffer.write(numpy.arange(150000, dtype="<f4").tobytes())
"""


class TestWorkerProcess:
    """The parent's side, with stand-ins for the worker."""

    def test_a_process_killed_from_outside_is_named(self, stand_in):
        worker = stand_in("time.sleep(60)")
        threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerError, match="running out of memory"):
            worker.ask({"op": "embed"})

    def test_a_process_that_dies_half_way_through_an_array(self, stand_in):
        worker = stand_in(HALF)
        with pytest.raises(WorkerError, match="ended with code 3") as caught:
            worker.ask({"op": "embed"})
        assert [len(line) for line in caught.value.log] == [1, 300]

    def test_what_it_started_ends_with_it(self, stand_in):
        worker = stand_in(WITH_A_CHILD)
        reply, array = worker.ask({"op": "x"})
        assert array.size == 0
        assert set(alive_in_group(worker.pid)) == {worker.pid, reply["child"]}
        worker.close()
        assert wait_until(lambda: not alive_in_group(worker.pid))
        worker.kill()  # twice is no mistake

    def test_arrays_come_whole(self, stand_in):
        worker = stand_in(WHOLE)
        _, array = worker.ask({"op": "x", "texts": ["\u2028 \u00e9"] * 10000})
        assert np.array_equal(array, np.arange(150000, dtype=np.float32).reshape(500, 300))
        worker.close()


class TestWithoutAnEngine:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr("dataflex_pipeline.vllm.engine.vllm_installed", lambda: False)
        with pytest.raises(ConfigError) as caught:
            require_vllm("generator: vllm")
        assert caught.value.what == "generator: vllm needs vLLM, and it is not installed."

    @with_vllm
    def test_a_model_that_is_none_is_refused_before_a_process_starts(self, tmp_path):
        with pytest.raises(UserError, match=r"has no config\.json"):
            VllmEngine("generate", str(tmp_path), {})

    def test_the_process_is_no_member_of_our_launch(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("RANKING", "kept")
        env = environment(parallel=False, offline=True, device=None)
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & env.keys()
        assert env["RANKING"] == "kept"
        assert (env["HF_HUB_OFFLINE"], env["VLLM_NO_USAGE_STATS"]) == ("1", "1")
        assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert environment(True, True, None)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"

    @pytest.mark.parametrize(
        ("device", "visible", "expected"),
        [("cuda:2", "", "2"), ("cuda:1", "4,5", "5"), ("cuda", "4,5", "4,5"), ("cpu", "4,5", "4,5")],
    )
    def test_the_device_that_was_asked_for_is_the_only_one_it_sees(
        self, monkeypatch, device, visible, expected
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert environment(False, True, device)["CUDA_VISIBLE_DEVICES"] == expected

    @pytest.mark.parametrize(
        ("device", "visible", "expected"),
        [
            ("cuda", "", ["0", "1"]),
            ("cuda", "4,5", ["4", "5"]),
            (None, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
            ("cpu", "4,5", ["4,5", "4,5"]),
        ],
    )
    def test_each_process_of_a_launch_has_its_own_gpu(self, monkeypatch, device, visible, expected):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("WORLD_SIZE", "4")
        seen = []
        for rank in ("2", "3"):  # of the second machine: the local rank counts
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("LOCAL_RANK", str(int(rank) - 2))
            seen.append(environment(False, True, device)["CUDA_VISIBLE_DEVICES"])
        assert seen == expected

    @with_vllm
    def test_a_model_over_several_gpus_in_several_processes_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="2 processes were started") as caught:
            VllmEngine("generate", str(tmp_path), {"tensor_parallel_size": 2})
        assert "tensor parallel size to 1" in caught.value.fix

    def test_an_adapter_never_wraps_the_head(self, tmp_path):
        def options(**config):
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
            return lora_options(str(tmp_path))

        made = options(r=12, target_modules=["model.layers.0.self_attn.q_proj", "up_proj", "lm_head"])
        assert made["lora_target_modules"] == ["q_proj", "up_proj"]
        assert made["max_lora_rank"] == 16
        assert "lora_target_modules" not in options(r=8, target_modules=".*proj")
        weights = ["model.layers.0.mlp.gate_proj.weight", "mlp.experts.down_proj"]
        made = options(r=8, target_modules=["q_proj"], target_parameters=weights)
        assert made["lora_target_modules"] == ["gate_proj", "q_proj"]
        assert options(r=300, target_modules=[])["max_lora_rank"] == 320

    def test_importing_the_generators_costs_no_torch(self):
        code = (
            "import sys, dataflex_pipeline.generate.generators\n"
            "print(sorted({'torch', 'vllm'} & set(sys.modules)))"
        )
        root = Path(__file__).resolve().parents[2]
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
        )
        assert found.stdout.strip() == "[]"
