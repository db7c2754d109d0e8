"""The guides' YAML files run end to end, with only the model and the data replaced.

Nothing else is changed: the guides' own 10 + 2 x 10 steps of one row each are short enough here.
"""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import data, dataflex, done, refused, snapshot

GUIDES = Path(__file__).resolve().parent / "guides"
COMPONENTS = "src/dataflex/configs/components.yaml"  # where the guides' files look for it


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in; the guides write to ../dataflex_saves, which is beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


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
    """Under ZeRO-3 the checkpoint has no Adam states by name yet, so that one line is taken out."""
    Path(COMPONENTS).parent.mkdir(parents=True)
    shutil.copy2(GUIDES / "components_less.yaml", COMPONENTS)
    done("round", 1, "--config", GUIDES / "less.yaml", *data(tiny_demo), "deepspeed=null")
    folder = here / "dataflex_saves" / "Llama-3.1-8B" / "less" / "round-01"
    scores = pq.read_table(folder / "scores" / "less.parquet")
    chosen = pq.read_table(folder / "index.parquet")["row"].to_pylist()
    best = scores.sort_by([("score", "descending"), ("row", "ascending")])["row"].to_pylist()
    assert sorted(chosen) == sorted(best[:10])  # steps x one row, the best of all


@pytest.mark.parametrize("method", ["nice", "tsds", "tsds_commented"])
def test_a_guide_whose_method_is_not_there_is_refused_by_name(here, tiny_demo, method):
    text = refused(here, "round", "--config", GUIDES / f"{method}.yaml", *data(tiny_demo))
    assert f"The method '{method.removesuffix('_commented')}' is not known" in text
    assert "There are entries for: delta_loss, less, loss, random" in text
    assert not (here / "dataflex_saves").exists()


def test_the_guides_file_goes_on_under_the_name_that_is_printed(here, tiny_demo):
    text = done("round", 1, "--config", GUIDES / "loss.yaml", *data(tiny_demo))
    (command,) = (line.partition("dataflex ")[2] for line in text.splitlines() if "go on:" in line)
    assert command == "round 2 output_dir=../dataflex_saves/Llama-3.1-8B/loss"
    assert dataflex(*command.split()).out.count("up to date") == 7  # all but round 2
