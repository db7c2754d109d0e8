"""The HTML page of a run: its figures against the tables, and its looks in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pandas
import pytest
from cli_runs import STEPS, copied, dataflex, done

from dataflex_pipeline.evaluation.figures import Figure, write_figures
from dataflex_pipeline.reports.findings import findings
from dataflex_pipeline.reports.records import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RANDOM = ("--round", 2, "--method", "random")
HOSTILE = "<script>document.title = 'taken over'</script><img src=http://example.invalid/x.png>"


class Texts(HTMLParser):
    """Collects table rows, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self._cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def run(tiny_demo, tmp_path_factory):
    folder = copied(tiny_demo, tmp_path_factory.mktemp("reported"))
    done("report", folder)
    return folder


@pytest.fixture(scope="module")
def hostile(tiny_demo, tmp_path_factory):
    """A run over data whose texts would take over a page that pasted them in."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "instruction": f"{HOSTILE} number {n}?",
            "input": "",
            "output": f"{n} {HOSTILE}",
            "kind": HOSTILE * (n % 2),
        }
        for n in range(24)
    ]
    (folder / "pool.json").write_text(json.dumps(rows))
    done(
        *("round", 1, "--run", "hostile", f"runs_dir={folder}", f"dataset={folder / 'pool.json'}"),
        *(f"model_name_or_path={tiny_demo.model}", *STEPS, "lora_rank=4", "per_device_train_batch_size=2"),
        *("plot_loss=false", "learning_rate=0.001", "eval_strategy=no"),
    )
    done("report", folder / "hostile")
    return folder / "hostile"


def test_shares_are_those_of_the_index_and_the_pool(run):
    parsed = Texts((run / "report.html").read_text())
    pool = pandas.read_parquet(run / "pool")
    index = pandas.read_parquet(run / "round-01" / "index.parquet")
    skills = pool.set_index("row")["original_skill"].loc[index["row"]]
    header = next(row for row in parsed.rows if row[:2] == ["", "pool"])
    for skill, count in skills.value_counts().items():
        line = next(row for row in parsed.rows if row and row[0] == skill)
        assert line[header.index("round 1")] == f"{100 * count / len(skills):.1f}"
        in_pool = (pool.loc[pool["valid"], "original_skill"] == skill).mean()
        assert line[header.index("pool")] == f"{100 * in_pool:.1f}"


def test_score_quantiles_are_those_of_the_table(run):
    parsed = Texts((run / "report.html").read_text())
    scores = pandas.read_parquet(run / "round-02" / "scores" / "loss.parquet")["score"]
    line = next(row for row in parsed.rows if row[:2] == ["loss", "2"])
    assert float(line[5]) == pytest.approx(scores.median(), rel=1e-3)
    assert float(line[7]) == pytest.approx(scores.max(), rel=1e-3)


def test_alike_is_what_pandas_counts_and_a_constant_score_is_in_no_pair(run, tmp_path):
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    done("score", "--run", folder.name, *RANDOM, f"runs_dir={tmp_path}")
    found = findings(RunRecord.read(folder))
    (pair,) = found["alike"]
    assert (pair["one"], pair["other"]) == ("loss, round 1", "loss, round 2")
    paths = [folder / f"round-{number:02d}" / "scores" / "loss.parquet" for number in (1, 2)]
    scores = [pandas.read_parquet(path)["score"] for path in paths]
    assert pair["rank_correlation"] == pytest.approx(scores[0].rank().corr(scores[1].rank()))
    n = round(len(scores[0]) * 0.1)
    best = [set(each.sort_values(ascending=False, kind="stable").index[:n]) for each in scores]
    assert pair["best_in_common"] == pytest.approx(len(best[0] & best[1]) / n)
    done("report", folder)
    text = (folder / "report.html").read_text()
    assert "score of loss, round 2" in text
    assert "score of random, round 2" not in text  # one bar that says nothing
    assert ["random", "2", "200", "0", "0", "0", "0", "0"] in Texts(text).rows


def test_the_header_names_what_selected_and_not_what_is_set_now(run, tmp_path):
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    done("score", "--run", folder.name, *RANDOM, f"runs_dir={tmp_path}")
    facts = findings(RunRecord.read(folder))["facts"]
    assert facts["selected by"] == "loss"


def test_evaluations_are_on_the_page(run, tmp_path):
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    write_figures(folder / "round-01" / "evaluation" / "metrics.parquet", [Figure("test", "f1", 0.25)], {})
    done("report", folder)
    assert ["1", "test", "f1", "0.25", "-", "-"] in Texts((folder / "report.html").read_text()).rows


def test_seconds_of_a_stage_are_those_of_all_its_calls(run, tmp_path):
    """And a stray folder beside the kept checkpoints is none of them."""
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    (folder / "round-01" / "checkpoints" / "step-old").mkdir(parents=True)
    (folder / "round-01" / "checkpoints" / "step-old2").mkdir()
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    entry = next(line for line in lines if line["stage"] == "train" and line.get("round") == 1)
    with (folder / "history.jsonl").open("a") as stream:
        stream.write(json.dumps({**entry, "seconds": 100.0}) + "\n")
    found = findings(RunRecord.read(folder))
    assert found["rounds"][1]["seconds"]["train"] == pytest.approx(entry["seconds"] + 100.0)


def test_the_page_stands_alone(run):
    text = (run / "report.html").read_text()
    tags = Texts(text).tags
    assert {tag for tag, _ in tags} & {"script", "link", "iframe", "img"} == set()
    assert all(a.get("href", "#").startswith("#") for tag, a in tags if tag == "a")
    assert re.findall(r"url\((?!#)|@import", text) == []
    anchors = {a["href"][1:] for tag, a in tags if tag == "a"}
    assert anchors <= {a.get("id") for _, a in tags}


def test_texts_of_the_data_are_shown_as_text(hostile):
    text = (hostile / "report.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_a_second_report_is_the_same_page(run):
    before = (run / "report.html").read_bytes()
    done("report", run)
    assert (run / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no run at"),
        ([], "0 runs were named"),
        (["{run}", "seed=3"], "The setting seed=3 was given"),
        (["{run}", "--output", "{run}"], "exists, and holds something else"),
        (["{run}", "--output", "{run}/run.yaml"], "exists, and holds something else"),
    ],
)
def test_what_cannot_be_reported_is_said(run, arguments, message):
    ran = dataflex("report", *[text.format(run=run) for text in arguments])
    assert ran.code == 2
    assert message in ran.err


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser, page_file, **settings):
    """Open a page; return it with the list of everything that it asked for."""
    page = browser.new_context(**settings).new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    return page, asked


def test_in_a_browser_nothing_is_fetched_and_no_text_runs(browser, hostile):
    page, asked = opened(browser, hostile / "report.html")
    assert asked == [(hostile / "report.html").as_uri()]
    assert page.title() == "hostile: DataFlex Pipeline report"


def test_on_a_phone_nothing_sticks_out(browser, run):
    page, _ = opened(browser, run / "report.html", viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("svg").first.bounding_box()["width"] <= 360


def contrast(page):
    """Return the contrast of text on the page's background (WCAG 2, relative luminance)."""
    colours = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )

    def luminance(colour):
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_light_and_dark_are_both_readable(browser, run):
    backgrounds = set()
    for scheme in ("light", "dark"):
        page, _ = opened(browser, run / "report.html", color_scheme=scheme)
        assert contrast(page) > 7
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        assert ink == page.evaluate("getComputedStyle(document.body).color")
    assert len(backgrounds) == 2


def test_by_keyboard_sections_are_reached_and_opened(browser, run):
    page, _ = opened(browser, run / "report.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#rounds"
    page.locator("#settings summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#settings details").first.get_attribute("open") is not None
