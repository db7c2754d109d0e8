"""`dataflex view` as a process: where it listens, what it shows in a browser, how it ends."""

import contextlib
import hashlib
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from cli_runs import dataflex
from made_run import add_embeddings, add_scores, add_selection, make_run

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/[\w-]{16}/")
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
PICTURE = "![a](https://example.com/a.png) [b](javascript:alert(1))"
N = 60

needs_tool = pytest.mark.skipif(
    find_spec("embedding_atlas") is None, reason="embedding-atlas (the extra `view`) is not installed"
)


@pytest.fixture
def run(tmp_path):
    conversations = [[("user", f"ask {n}"), ("assistant", f"say {n}")] for n in range(N)]
    conversations[0] = [("user", HOSTILE), ("assistant", PICTURE)]
    conversations[1] = [("user", "\x1b[31mred\x00 \u202eesrever"), ("assistant", "long " * 2_000_000)]
    run = make_run(tmp_path / "runs" / "mine", conversations)
    add_scores(run, 1, "loss", [float(N - n) for n in range(N)])
    add_selection(run, 1, [0, 1, 2])
    add_embeddings(run, np.random.default_rng(0).standard_normal((N, 4)))
    return run


@contextlib.contextmanager
def viewing(run, *arguments):
    """Start the command; yield the process, its address and what it said. It is interrupted at the end."""
    command = [sys.executable, "-m", "dataflex_pipeline", "view", str(run.folder), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = ""
            while "Ctrl-C" not in said:
                line = process.stdout.readline()
                assert line, f"it ended: {said}"
                said += line
            yield process, ADDRESS.search(said)[0], said
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def digests(folder: Path):
    files = [
        path for path in folder.rglob("*") if path.is_file() and "view" not in path.relative_to(folder).parts
    ]
    return {path: (hashlib.md5(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def get(address, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60)


@needs_tool
def test_it_listens_on_this_machine_alone_and_ends_well(run):
    before = digests(run.folder)
    with viewing(run, "--port", 0) as (process, address, said):
        (listening,) = {
            each.laddr for each in psutil.Process(process.pid).net_connections() if each.status == "LISTEN"
        }
        assert listening.ip == "127.0.0.1"
        assert f"{N} rows of mine" in said
        assert b"Embedding Atlas" in get(address).read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"http://127.0.0.1:{listening.port}/")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            get(address, Host="rebound.example")
        with viewing(run, "--port", listening.port) as (_, second, told):
            assert f"Port {listening.port} is not free" in told
            assert get(second).status == 200
    assert process.returncode == 0
    assert digests(run.folder) == before
    assert sorted(path.name for path in (run.folder / "view").glob("*.parquet")) == [
        "map.parquet",
        "rows.parquet",
    ]


def test_a_missing_tool_and_a_wrong_name_are_said(run, monkeypatch):
    from dataflex_pipeline.reports.viewer import serve as viewer

    monkeypatch.setattr(viewer, "find_spec", lambda name: None)
    ran = dataflex("view", run.folder)
    assert ran.code == 2
    assert "dataflex view needs embedding-atlas, which is not installed." in ran.err
    assert "pip install 'dataflex-pipeline[view]'" in ran.err
    assert not (run.folder / "view").exists()
    ran = dataflex("view")
    assert (ran.code, "0 runs were named." in ran.err) == (2, True)


@pytest.mark.slow
@needs_tool
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_the_page_in_a_browser(run):
    """Usable, no request to another machine, no error, hostile text as text."""
    from playwright.sync_api import sync_playwright

    hosts, errors = set(), []
    with viewing(run, "--port", 0) as (_, address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.get_by_text(f"{N} / {N} points").wait_for()
        page.get_by_text(HOSTILE).first.wait_for()
        page.get_by_text("more characters").first.wait_for()
        page.get_by_text("round 1", exact=True).last.click()  # the bar; the others are cells
        page.get_by_text(f"3 / {N} points").wait_for()
        count = page.get_by_text(f"3 / {N} points").bounding_box()
        page.mouse.click(count["x"] + count["width"] + 45, count["y"] + 8)  # the arrow, which has no name
        page.locator('select:has(option:text("CSV"))').first.select_option(label="CSV")
        with page.expect_download() as download:
            page.get_by_text("Export Selection").click()
        assert pd.read_csv(download.value.path())["row"].tolist() == [0, 1, 2]
        assert page.title() == "Embedding Atlas"
        assert page.locator("img[src*='example.com']").count() == 0
        browser.close()
    assert hosts == {address.split("/")[2]}
    webgpu = re.compile("webgpu", re.IGNORECASE)  # a browser without a GPU; the page says so by itself
    assert [error for error in errors if not webgpu.search(error)] == []
