"""What a run remembers of sources and model: unchanged files are not read again, changes are noticed."""

import os
import re
import shutil

import pytest
from cli_runs import done, refused, small, snapshot


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(here, tiny_demo):
    """A warm-up on copies of the data and the model, so that they can be changed."""
    for name in ("pool", "target"):
        shutil.copy2(getattr(tiny_demo, name), here / f"{name}.jsonl")
    shutil.copytree(tiny_demo.model, here / "model")
    settings = ("dataset=pool.jsonl", "eval_dataset=target.jsonl", "model_name_or_path=./model")
    done("warmup", *small(tiny_demo), *settings, "--run", "own")
    return ("--run", "own")


def test_unchanged_sources_and_weights_are_not_read_again(own, here, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was read again")

    monkeypatch.setattr("dataflex_pipeline.pipeline.prepare.scan_sources", never)
    monkeypatch.setattr("dataflex_pipeline.pipeline.memo.file_digest", never)
    before = snapshot(here)
    assert done("warmup", *own).count("up to date") == 4
    assert snapshot(here) == before


@pytest.mark.parametrize("same_size_and_time", [False, True])
def test_a_changed_source_is_noticed(own, here, same_size_and_time):
    """Also when size and modification time are those of before, as `cp -p` or `touch -r` leave them."""
    path = here / "pool.jsonl"
    old, lines = path.stat(), path.read_text().splitlines()
    lines[3] = lines[3].replace('"output": "', '"output": "Q', 1)
    if same_size_and_time:
        lines[3] = re.sub(r'("output": "Q.*?).(")', r"\1\2", lines[3], count=1)
    path.write_text("\n".join(lines) + "\n")
    if same_size_and_time:
        assert path.stat().st_size == old.st_size
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "sources" in refused(here, "warmup", *own)


def test_a_touched_source_is_read_again_and_found_to_be_the_same(own, here):
    os.utime(here / "pool.jsonl", (1, 1))
    text = done("warmup", *own)
    assert "reading pool" in text
    assert text.count("up to date") == 4
    assert "reading" not in done("warmup", *own)


def test_changed_weights_are_noticed(own, here):
    weights = here / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model: " in refused(here, "warmup", *own)


def test_a_changed_chat_template_is_noticed(own, here):
    with (here / "model" / "chat_template.jinja").open("a") as stream:
        stream.write(" ")
    assert "tokenizer: " in refused(here, "warmup", *own)


def test_a_changed_declaration_of_a_source_is_noticed(own, here):
    assert "max_samples: null -> 50" in refused(here, "warmup", *own, "max_samples=50")


def test_without_the_memory_everything_is_read_again(own, here):
    memory = here / "runs" / "own" / "sources.json"
    content = memory.read_bytes()
    memory.unlink()
    assert done("warmup", *own).count("up to date") == 4
    assert memory.read_bytes() == content


def test_a_hub_data_set_is_known_by_its_version(monkeypatch):
    from dataflex_pipeline.data.settings import DataSettings
    from dataflex_pipeline.data.sources.hub import HubName
    from dataflex_pipeline.data.sources.named import Source
    from dataflex_pipeline.pipeline import memo

    settings, source = DataSettings(("a/b",), "data", None, 64, None), Source("b", "a/b", hub=HubName("a/b"))
    keys = []
    for version in ("one", "two", "one"):
        monkeypatch.setattr(memo, "hub_fingerprint", lambda hub, given, version=version: version)
        keys.append(memo.sources_key(settings, (source,)))
    assert keys[0] == keys[2] != keys[1]
