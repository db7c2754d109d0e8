"""The guides' YAML files run end to end, with only the model and the data replaced.

Nothing else is changed: the guides' own 10 + 2 x 10 steps of one row each are short enough here.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import data, dataflex, done, refused, snapshot

GUIDES = Path(__file__).resolve().parents[1] / "guides"
COMPONENTS = "src/dataflex/configs/components.yaml"  # where the guides' files look for it


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in; the guides write to ../dataflex_saves, which is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("own_components", [False, True])
@pytest.mark.parametrize("method", ["loss", "delta_loss"])
def test_a_guides_file_runs_to_its_horizon(here, tiny_demo, method, own_components):
    if own_components:
        Path(COMPONENTS).parent.mkdir(parents=True)
        shutil.copy2(GUIDES / f"components_{method}.yaml", COMPONENTS)
    text = done("round", "--config", GUIDES / f"{method}.yaml", *data(tiny_demo))

    saves = here / "dataflex_saves" / "Llama-3.1-8B"
    (folder,) = saves.iterdir()
    assert [path.name for path in sorted(folder.glob("round-*"))] == ["round-00", "round-01", "round-02"]
    for number in range(3):
        index = pq.read_table(folder / f"round-{number:02d}" / "index.parquet")
        assert index.num_rows == 10  # steps x one row
        assert (folder / f"round-{number:02d}" / "checkpoint" / "COMPLETE.json").is_file()
    assert (folder / "training_loss.png").is_file()  # plot_loss
    last, top = snapshot(folder / "round-02" / "checkpoint"), snapshot(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert top[name][0] == last[name][0]
    # What is different here from where the file was written is said.
    assert "bf16: true becomes fp32 on a CPU" in text
    assert "overwrite_output_dir: true" in text
    assert ("the shipped configs/components.yaml is taken" in text) == (not own_components)
    assert (f"cache_dir of {method}" in text) == own_components
    assert "go on:" not in text


def test_the_components_file_of_the_guide_decides(here, tiny_demo):
    Path(COMPONENTS).parent.mkdir(parents=True)
    content = (GUIDES / "components_loss.yaml").read_text()
    Path(COMPONENTS).write_text(content.replace('"medium"', "low").replace("5.0", "1000"))
    done("round", 1, "--config", GUIDES / "loss.yaml", *data(tiny_demo), "--run", "low")
    folder = Path("runs/low/round-01")
    probability = pq.read_table(folder / "probabilities" / "loss.parquet")["probability"].to_numpy()
    loss = pq.read_table(folder / "scores" / "loss.parquet")["loss"].to_numpy()
    assert set(probability.argsort()[-66:]) == set(loss.argsort()[:66])  # a third of 200 rows, the lowest
    assert probability.max() / probability.min() == pytest.approx(1000)


def test_the_guides_file_of_less_runs_without_its_deepspeed_line(here, tiny_demo):
    """In one process; with the line, under ZeRO-3, it runs in tests/invariant/test_scale_deepspeed.py."""
    Path(COMPONENTS).parent.mkdir(parents=True)
    shutil.copy2(GUIDES / "components_less.yaml", COMPONENTS)
    done("round", 1, "--config", GUIDES / "less.yaml", *data(tiny_demo), "deepspeed=null")
    folder = here / "dataflex_saves" / "Llama-3.1-8B" / "less" / "round-01"
    scores = pq.read_table(folder / "scores" / "less.parquet")
    chosen = pq.read_table(folder / "index.parquet")["row"].to_pylist()
    best = scores.sort_by([("score", "descending"), ("row", "ascending")])["row"].to_pylist()
    assert sorted(chosen) == sorted(best[:10])  # steps x one row, the best of all


PLAIN = """
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 2
lora_target: all
flash_attn: auto
packing: false
cutoff_len: 256
max_samples: 60
overwrite_cache: true
preprocessing_num_workers: 2
output_dir: saves/sft
logging_steps: 10
save_steps: 500
plot_loss: false
save_only_model: false
report_to: none
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
gradient_checkpointing: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
components_cfg_file: components.yaml
"""


def test_a_plain_file_for_fine_tuning_runs_as_a_selection(here, tiny_demo):
    """With the keys of LLaMA-Factory's files, and components with the sections of DataFlex 1.1.0."""
    own = f"model_name_or_path: {tiny_demo.model}\ndataset: {tiny_demo.pool}\n"
    Path("sft.yaml").write_text(own + PLAIN)
    Path("components.yaml").write_text(
        "selectors:\n  loss: {name: loss, params: {focus: low, score_batch_size: 8}}\n"
        "mixers:\n  static: {name: static, params: {proportions: [0.5, 0.5]}}\n"
        "pipelines:\n  one: {name: one, params: {stages: [{family: selector, component: loss}]}}\n"
    )
    text = " ".join(done("round", 1, "--config", "sft.yaml").split())
    # 60 rows, 8 a step: 8 steps an epoch, 16 in all; 16 // 6 of them the warm-up, (16 - 2) // 5 each round
    assert "they are 16; warmup_step=2, then update_step=2 in each of 5 rounds" in text
    for said in (
        "val_size: 0.1 (",
        "eval_strategy has no effect",
        "flash_attn: auto (",
        "score_batch_size of loss",
    ):
        assert text.count(said) == 1
    assert text.count("is passed over: ") == 2
    index = pq.read_table("saves/sft/round-01/index.parquet")
    assert index.num_rows == 2 * 8
    assert Path("saves/sft/adapter_model.safetensors").is_file()
    listed = done("methods", "--config", "sft.yaml")
    assert "less: " in listed
    assert "mixers" not in listed.replace("mixers (", "")
    assert "low" in done("methods", "loss", "--config", "saves/sft/run.yaml")


JUDGE = ("nice.reward_model_backend=metric", "nice.reward_backend_params.metric.name=chrf")


@pytest.mark.slow  # vLLM is loaded once per round
def test_the_guides_file_of_nice_runs_with_another_judge(here, tiny_demo):
    """Model, data and judge are replaced; what draws the answers is vLLM wherever it is installed."""
    Path(COMPONENTS).parent.mkdir(parents=True)
    shutil.copy2(GUIDES / "components_nice.yaml", COMPONENTS)
    text = done("round", "--config", GUIDES / "nice.yaml", *data(tiny_demo), *JUDGE)
    folder = here / "dataflex_saves" / "nice_output"
    for number in (1, 2):
        scores = pq.read_table(folder / f"round-{number:02d}" / "scores" / "nice.parquet")
        best = scores.sort_by([("score", "descending"), ("row", "ascending")])["row"].to_pylist()
        chosen = pq.read_table(folder / f"round-{number:02d}" / "index.parquet")["row"].to_pylist()
        assert sorted(chosen) == sorted(best[:10])  # steps x one row, the best of all
    answers = pq.read_table(next((folder / "features").glob("generations-target-*")))
    assert answers.num_rows == 16 * 4  # mc_samples
    assert len(list((folder / "features").glob("gradients-pool-*/part-*"))) == 2 * 13  # save_interval: 16
    assert text.count("of 64 answers to the target's 16 prompts") == 2


SHORT = ("warmup_step=2", "update_step=2", "gradient_accumulation_steps=2")
OFFLINE = "src/dataflex/offline_selector/tsds_probs.npy"  # where the guide's files look for it
HERE_WITHOUT = ("deepspeed=null", "use_swanlab=false")  # ZeRO-3 and a tracker that is no dependency


@pytest.fixture
def embedded(here, tiny_demo):
    """Vectors of the pool and of its first 100 rows, in place of an embedding model."""
    vectors = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    np.save("pool.npy", vectors)
    np.save("first.npy", vectors[:100])
    return ("tsds.embeddings=pool.npy", "tsds.query_embeddings=first.npy", "tsds.query=first_100")


def only_pool(demo):
    return (f"dataset={demo.pool}", f"model_name_or_path={demo.model}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsds", "tsds_commented"])
def test_the_guides_two_steps_of_tsds(here, tiny_demo, embedded, name):
    """Offline selection saves probabilities; the two files of the guide train on them, without a target."""
    offline = (*only_pool(tiny_demo), *SHORT, *embedded, f"tsds.save_probs_path={OFFLINE}", "deepspeed=null")
    done("round", 1, "--config", GUIDES / "tsds.yaml", *offline, "--run", "offline")
    saved = np.load(OFFLINE)
    assert saved.shape == (200,)
    assert saved.sum() == pytest.approx(1, abs=1e-12)

    Path(COMPONENTS).parent.mkdir(parents=True)
    shutil.copy2(GUIDES / "components_tsds.yaml", COMPONENTS)
    lines = (GUIDES / f"{name}.yaml").read_text().splitlines(keepends=True)
    own = Path("own.yaml")  # the commented file names a target by an entry of the peer's data folder
    own.write_text("".join(line for line in lines if not line.startswith("eval_dataset")))
    text = done("round", "--config", own, *only_pool(tiny_demo), *SHORT, *HERE_WITHOUT)
    assert "cache_dir of tsds" in text
    folder = here / "dataflex_saves"
    for number in (1, 2):
        probability = pq.read_table(folder / f"round-{number:02d}" / "probabilities" / "tsds.parquet")
        assert np.array_equal(probability["probability"].to_numpy(), saved)
        chosen = pq.read_table(folder / f"round-{number:02d}" / "index.parquet")["row"].to_numpy()
        assert len(chosen) == 2 * 2 * 2  # steps x rows x accumulation
        assert (saved[chosen] > 0).all()
    assert not (folder / "features").exists()
    assert (folder / "adapter_model.safetensors").is_file()


def test_the_guides_file_of_tsds_without_its_probabilities(here, tiny_demo):
    Path(COMPONENTS).parent.mkdir(parents=True)
    shutil.copy2(GUIDES / "components_tsds.yaml", COMPONENTS)
    text = refused(here, "round", "--config", GUIDES / "tsds.yaml", *only_pool(tiny_demo))
    assert f"probs_path=./{OFFLINE} was set" in text or f"probs_path={OFFLINE} was set" in text
    assert "save_probs_path" in text


def test_the_guides_file_of_tsds_without_a_target(here, tiny_demo):
    text = refused(here, "round", "--config", GUIDES / "tsds.yaml", *only_pool(tiny_demo))
    assert "The method tsds was chosen and eval_dataset is not set." in text
    assert "query: first_100" in text


def test_the_guides_python_settings_of_tsds_are_parameters(here, tiny_demo, embedded):
    """The guide's offline script, argument by argument, with only data and model replaced."""
    script = {
        "candidate_path": tiny_demo.pool,
        "query_path": tiny_demo.target,
        "embed_model": "Qwen/Qwen3-Embedding-0.6B",
        "embed_method": "auto",
        "batch_size": 32,
        "save_probs_path": "tsds_probs.npy",
        "max_K": 5000,
        "kde_K": 1000,
        "sigma": 0.75,
        "alpha": 0.6,
        "C": 5.0,
    }
    np.save("target.npy", np.load("pool.npy")[:16])
    given = [f"tsds.{name}={value}" for name, value in script.items()]
    made = ("tsds.embeddings=pool.npy", "tsds.query_embeddings=target.npy")  # in place of the hub's model
    model = f"model_name_or_path={tiny_demo.model}"
    done("round", 1, "--method", "tsds", model, *SHORT, "update_times=1", *given, *made, "--run", "a")
    assert np.load("tsds_probs.npy").shape == (200,)


@pytest.mark.slow
def test_the_guides_file_goes_on_under_the_name_that_is_printed(here, tiny_demo):
    text = done("round", 1, "--config", GUIDES / "loss.yaml", *data(tiny_demo))
    (command,) = (line.partition("dataflex ")[2] for line in text.splitlines() if "go on:" in line)
    assert command == "round 2 output_dir=../dataflex_saves/Llama-3.1-8B/loss"
    assert dataflex(*command.split()).out.count("up to date") == 7  # all but round 2
