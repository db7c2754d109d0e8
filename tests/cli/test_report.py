"""The HTML page of a run: its figures against the tables, and its looks in a real browser."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import pandas
import pytest
from cli_runs import STEPS, copied, dataflex, done, refused

from dataflex_pipeline.evaluation.figures import Figure, write_figures
from dataflex_pipeline.reports.page.findings import findings
from dataflex_pipeline.reports.records import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RANDOM = ("--round", 2, "--method", "random")
HOSTILE = (
    "<script>document.title = 'taken over'</script></script><!--<script><img src=http://example.invalid/x.png>"
    "\x1b[2J\u202egnp.exe\u2028"
)
LONG = "long " * 2_000_000


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


def island(page_file, name):
    """Return the plain values that a page holds under a name."""
    (text,) = re.findall(f'<script type="application/json" id="{name}">(.*?)</script>', page_file.read_text())
    assert not set(text) & set("<>&\u2028\u2029")
    return json.loads(text)


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
    rows[3]["output"] = LONG
    rows[4]["output"] = ""
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


def lines(spec):
    """Return the lines of a chart's data that are of a table of scores."""
    given = [spec.get("data"), *(layer.get("data") for layer in spec.get("layer", []))]
    values = [line for each in given if each for line in each.get("values", [])]
    values += [line for each in spec.get("datasets", {}).values() for line in each]
    return [line for line in values if "table" in line]


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
    names = {
        line["table"] for spec in island(folder / "report.html", "specs").values() for line in lines(spec)
    }
    assert names == {"loss, round 1", "loss, round 2"}  # one bar for random would say nothing
    text = (folder / "report.html").read_text()
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
    assert {tag for tag, _ in tags} & {"link", "iframe", "img", "object"} == set()
    assert all("src" not in a for _, a in tags)
    assert all(a.get("href", "#").startswith("#") for tag, a in tags if tag == "a")
    (policy,) = (a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert len(text) < 5_000_000
    anchors = {a["href"][1:] for tag, a in tags if tag == "a"}
    assert anchors <= {a.get("id") for _, a in tags}


@pytest.mark.slow
def test_texts_of_the_data_are_shown_as_text(hostile):
    whole = (hostile / "report.html").read_text()
    assert whole.count("<script>") == 3
    text = re.sub(r"<script>.*?</script>", "", whole, flags=re.DOTALL)  # the library names tags of its own
    assert "document.title = " in text
    assert "<script>document.title" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert not set(text) & set("\x1b\u202e\u2028")
    rows = {row["row"]: row for row in island(hostile / "report.html", "data")["rows"]}
    shown = HOSTILE.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e").replace("\u2028", "\\u2028")
    assert shown in "".join(rows[0]["turns"][0][1:4])
    assert rows[4]["reason"]


def test_a_long_text_is_cut_with_what_is_missing_said_and_its_labelled_part_marked(hostile):
    rows = {row["row"]: row for row in island(hostile / "report.html", "data")["rows"]}
    role, before, learnt, after, cut = rows[3]["turns"][-1]
    assert (role, before) == ("assistant", "")
    assert len(learnt) + len(after) + cut == len(LONG)
    assert 0 < len(learnt) <= 20_000
    assert learnt in LONG
    assert (hostile / "report.html").stat().st_size < 2_000_000


def test_rows_of_the_page_are_those_of_the_tables(run):
    data = island(run / "report.html", "data")
    pool = pandas.read_parquet(run / "pool").set_index("row")
    scores = pandas.read_parquet(run / "round-02" / "scores" / "loss.parquet").set_index("row")["score"]
    ranks = scores.rank(ascending=False, method="first")
    index = pandas.read_parquet(run / "round-01" / "index.parquet")["row"].value_counts()
    place = [table["name"] for table in data["tables"]].index("loss, round 2")
    assert len(data["rows"]) == len(pool)
    for row in data["rows"]:
        number = row["row"]
        assert row["response"] == pool["n_response_tokens"][number]
        assert row["scores"][place][:2] == [pytest.approx(scores[number], rel=1e-5), ranks[number]]
        assert row["selected"].get("1", [None, 0])[1] == index.get(number, 0)
        [question, answer] = row["turns"]
        assert question[2] == ""
        assert answer[2] == pool["messages"][number][1]["content"]


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
        (["{run}", "--output", "{run}"], "a folder, a device or a pipe"),
        (["{run}", "--output", "{run}/run.yaml"], "a file of the run"),
        (["{run}", "--output", "{run}/run.yaml", "--overwrite"], "a file of the run"),
        (["{run}", "--output", "{run}/round-01/selection.parquet", "--overwrite"], "in a folder of the run"),
    ],
)
def test_what_cannot_be_reported_is_said_and_nothing_is_set_aside(run, arguments, message):
    before = sorted(run.rglob("*"))
    ran = dataflex("report", *[text.format(run=run) for text in arguments])
    assert ran.code == 2
    assert message in ran.err
    assert sorted(run.rglob("*")) == before


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser, page_file, **settings):
    """Open a page; return it with all that it asked for, and all that it complained of."""
    page = browser.new_context(**settings).new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=90_000)
    return page, asked, said


def test_in_a_browser_nothing_is_fetched_and_no_text_runs(browser, hostile):
    page, asked, said = opened(browser, hostile / "report.html")
    page.locator("#list .open").first.click()
    for _ in range(23):
        page.keyboard.press("ArrowRight")
    assert asked == [(hostile / "report.html").as_uri()]
    assert said == []
    assert page.title() == "hostile: DataFlex Pipeline report"
    assert page.locator("main img, dialog img").count() == 0


def test_the_policy_lets_no_request_out(browser, run):
    page, _, said = opened(browser, run / "report.html")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.evaluate("fetch('http://127.0.0.1:9/x').catch(() => {})")
    page.wait_for_timeout(200)
    assert len(said) >= 2
    assert all("Content Security Policy" in line for line in said)


@pytest.mark.parametrize("width", [390, 1280])
def test_at_no_width_anything_sticks_out(browser, run, width):
    page, _, said = opened(browser, run / "report.html", viewport={"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#list .open").first.click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.locator(".plot svg").first.bounding_box()["width"] <= width
    assert said == []


WIDE = {"viewport": {"width": 1280, "height": 900}}


def test_pointing_at_a_bar_tells_of_it_and_a_click_lists_its_rows(browser, run):
    page, _, said = opened(browser, run / "report.html", **WIDE)
    bar = page.locator("figure[data-name=shares] .mark-rect.role-mark path").first
    bar.hover()
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.wait_for(state="visible")
    told = tooltip.inner_text()
    label = bar.get_attribute("aria-label")
    skill, round_ = re.search(r"rows of: ([^;]+)", label)[1], re.search(r"in: ([^;]+)", label)[1]
    assert skill in told
    assert "rows of" in told
    bar.click()
    assert page.locator("#by-original_skill").input_value() == skill
    rows = island(run / "report.html", "data")["rows"]
    expected = [
        row
        for row in rows
        if row["own"]["original_skill"] == skill
        and (round_ == "pool" or round_.removeprefix("round ") in row["selected"])
    ]
    assert page.locator("#found").inner_text().startswith(f"{len(expected)} of {len(rows)} rows")
    assert said == []


def test_an_interval_of_scores_lists_its_rows(browser, run):
    page, _, said = opened(browser, run / "report.html", **WIDE)
    plot = page.locator("figure[data-name=scores] .plot svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.3, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, y, steps=5)
    page.mouse.up()
    take = page.locator("figure[data-name=scores] .take")
    take.wait_for(state="visible")
    low, high = map(float, re.findall(r"-?\d[\d.]*(?:e-?\d+)?", take.inner_text()))
    take.click()
    rows = island(run / "report.html", "data")["rows"]
    expected = sum(low <= row["scores"][0][0] <= high for row in rows)
    found = int(page.locator("#found").inner_text().split()[0])
    assert abs(found - expected) <= 2  # the ends are written with four digits
    assert 0 < found < len(rows)
    assert said == []


def test_rows_are_searched_sorted_filtered_and_opened(browser, run):
    page, _, said = opened(browser, run / "report.html")
    rows = {row["row"]: row for row in island(run / "report.html", "data")["rows"]}
    page.keyboard.press("/")
    word = max("".join(rows[0]["turns"][0][1:4]).split(), key=len).lower()
    page.keyboard.type(word)
    holding = [n for n, row in rows.items() if word in json.dumps(row["turns"], ensure_ascii=False).lower()]
    found = page.locator("#found").inner_text()
    assert f" of {len(rows)} rows" in found
    assert len(holding) <= int(found.split()[0]) < len(rows)
    page.locator("#search").fill("")
    page.locator("#by-round").select_option("1")
    chosen = sorted(n for n, row in rows.items() if "1" in row["selected"])
    for expected in (chosen, chosen[::-1]):
        page.locator("#list thead button").first.click()
        assert [int(text) for text in page.locator("#list .open").all_inner_texts()] == expected
    page.locator("#list .open").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    shown = rows[chosen[-2]]
    assert page.locator("#row-title").inner_text() == f"Row {shown['row']}"
    assert page.locator("dialog .said mark").text_content() == shown["turns"][1][2]
    page.keyboard.press("ArrowRight")
    assert page.locator("#row-title").inner_text() == f"Row {chosen[-3]}"
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
    assert page.evaluate("document.activeElement.textContent") == str(chosen[-3])
    assert said == []


def test_by_keyboard_a_chart_is_read_and_taken(browser, run):
    page, _, said = opened(browser, run / "report.html")
    page.locator("figure[data-name=shares] .plot").first.focus()
    page.keyboard.press("ArrowRight")
    told = page.locator("figure[data-name=shares] .reading").first.inner_text()
    skill = re.search(r"rows of: ([^;]+)", told)[1]
    page.keyboard.press("Enter")
    assert page.locator("#by-original_skill").input_value() == skill
    assert page.evaluate("document.activeElement.id") == "search"
    assert said == []


def test_the_legend_keeps_one_kind(browser, run):
    page, _, said = opened(browser, run / "report.html", **WIDE)
    figure = page.locator("figure[data-name=scores]")
    faded = figure.locator(".mark-rect.role-mark path[opacity='0.12']")
    assert faded.count() == 0
    figure.locator(".role-legend-symbol path").first.click()
    faded.first.wait_for(state="attached")
    assert said == []


def test_printed_it_is_black_on_white(browser, run):
    page, _, _ = opened(browser, run / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.locator("nav").is_hidden()
    assert page.locator("#filters").is_hidden()
    assert page.locator(".plot svg").first.is_visible()


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
        page, _, _ = opened(browser, run / "report.html", color_scheme=scheme)
        assert contrast(page) > 7
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ink = page.evaluate("getComputedStyle(document.querySelector('.role-axis-label text')).fill")
        assert ink == page.evaluate("getComputedStyle(document.body).color")
    assert len(backgrounds) == 2


def test_by_keyboard_sections_are_reached_and_opened(browser, run):
    page, _, _ = opened(browser, run / "report.html")
    for target in ("#main", "#selected"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('href')") == target
    page.locator("#settings summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#settings details").first.get_attribute("open") is not None


def test_what_to_run_where_the_index_of_a_trained_round_is_gone(tiny_demo, tmp_path):
    folder = copied(tiny_demo, tmp_path)
    (folder / "round-02" / "index.parquet").unlink()
    text = refused(folder, "report", folder)
    assert "round 2 was trained on it" in text
    _, *words = shlex.split(text.split("Run `", 1)[1].split("`", 1)[0])
    assert "train, round 2" in done(*words)
    assert (folder / "round-02" / "index.parquet").is_file()
    done("report", folder)
