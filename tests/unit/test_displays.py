"""What a notebook shows of a run, its tables and comparisons; plain Python stays silent."""

import html.parser
import subprocess
import sys

import numpy as np
import pytest
from made_run import add_scores, add_selection, make_run

from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.pipeline.table import Table
from dataflex_pipeline.reports.comparison import Comparison, Paired, Spread
from dataflex_pipeline.reports.displays import TEXT

N = 40
HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>"
ALLOWED = {"div", "p", "b", "br", "table", "thead", "tbody", "tr", "th", "td", "bdi", "code"}


class Page(html.parser.HTMLParser):
    """The tags of a page, and its cells as text by line."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.lines, self.text, self.inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert {name for name, _ in attrs} <= {"style"}
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.lines[-1][-1] += data


@pytest.fixture
def made(tmp_path):
    conversations = [[("user", f"ask {n}"), ("assistant", f"say {n}")] for n in range(N)]
    conversations[7] = [("user", HOSTILE), ("assistant", "x" * 1000)]
    skill = [("add", "sort", None, "copy")[n % 4] for n in range(N)]
    run = make_run(tmp_path / "run", conversations, {"skill": skill, "id": [f"i{n}" for n in range(N)]})
    scores = [None if n == 5 else float(n % 10) for n in range(N)]
    add_scores(run, 1, "loss", scores)
    add_selection(run, 1, [9, 7, 7, 2])
    return run, scores


def scores_of(made):
    return Table(made[0].round(1).scores("loss"), f"summary {HOSTILE}", by="score")


def selection_of(made):
    return Table(made[0].round(1).selection, "four lines", by="score")


def test_a_score_table_shows_its_best_lines_with_their_texts(made):
    page = Page(scores_of(made)._repr_html_())
    assert page.lines[0] == ["row", "score", "text"]
    assert [line[:2] for line in page.lines[1:6]] == [
        ["9", "9"],
        ["19", "9"],
        ["29", "9"],
        ["39", "9"],
        ["8", "8"],
    ]
    assert page.lines[1][2] == "user: ask 9 | assistant: say 9"
    assert f"The best 10 of {N} lines" in page.text
    assert set(page.tags) <= ALLOWED
    assert f"summary {HOSTILE}" in page.text


def test_a_selection_shows_its_lines_in_order_of_rank(made):
    page = Page(selection_of(made)._repr_html_())
    assert page.lines[0][:3] == ["rank", "row", "source"]
    assert [line[1] for line in page.lines[1:]] == ["9", "7", "7", "2"]
    assert page.lines[2][-1].startswith(f"user: {HOSTILE}")
    assert page.lines[2][-1].endswith("...")
    assert len(page.lines[2][-1]) == TEXT + 3
    assert set(page.tags) <= ALLOWED


def values(chart):
    return list(chart.to_dict()["data"]["values"])


def test_the_chart_of_scores_counts_every_row_once(made):
    lines = values(scores_of(made).plot())
    counted = {of: sum(line["rows"] for line in lines if line["of"] == of) for of in ("selected", "the rest")}
    assert counted == {"selected": 3, "the rest": N - 4}  # row 5 has no score


def test_the_charts_by_group_are_those_of_numpy(made):
    _, scores = made
    skill = np.array([("add", "sort", "(none)", "copy")[n % 4] for n in range(N)])
    known = np.array([np.nan if score is None else score for score in scores])
    chart = scores_of(made).plot(by="skill").to_dict()
    lines = (
        next(each for each in chart["datasets"].values()) if "datasets" in chart else chart["data"]["values"]
    )
    assert sorted(line["name"] for line in lines) == ["(none)", "add", "copy", "sort"]
    for line in lines:
        own = known[(skill == line["name"]) & np.isfinite(known)]
        assert line["rows"] == len(own)
        assert [line[key] for key in ("p05", "p50", "p95")] == pytest.approx(
            np.quantile(own, [0.05, 0.5, 0.95])
        )
    shares = values(selection_of(made).plot(by="skill"))
    round_1 = {line["name"]: line["rows"] for line in shares if line["of"] == "round 1"}
    assert round_1 == {"sort": 1, "copy": 1, "(none)": 1, "add": 0}  # rows 9, 7 and 2
    sources = {(line["name"], line["of"]): line["share"] for line in values(selection_of(made).plot())}
    assert sources["alpaca", "pool"] == 0.5
    assert sources["code", "round 1"] == pytest.approx(2 / 3)


def test_what_cannot_be_grouped_by_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="by is 'skil'") as caught:
        scores_of(made).plot(by="skil")
    assert "Did you mean 'skill'?" in caught.value.fix
    with pytest.raises(UserError, match="more than 30 different values"):
        selection_of(made).plot(by="id")
    alone = tmp_path / "alone.parquet"
    alone.write_bytes(made[0].round(1).selection.read_bytes())
    with pytest.raises(RunError, match="in no run with a prepared pool"):
        Table(alone, "", by="score").plot()
    assert Page(Table(alone, "", by="score")._repr_html_()).lines[0][0] == "rank"


def test_a_table_that_cannot_be_read_says_why(made):
    table = scores_of(made)
    table.path.write_bytes(b"PAR1 and no more")
    page = Page(table._repr_html_())
    assert "It was written whole by this program" in page.text
    assert set(page.tags) == {"p"}


def test_a_comparison_shows_each_method(made):
    figures = {"target loss": {"less": Spread({1: 0.5, 2: 0.7}), "random": Spread({1: 1.0, 2: 1.0})}}
    paired = {"target loss": {"less": Paired(-0.4, 0.16, 2)}}
    methods, nothing = ("random", "less"), {}
    comparison = Comparison(
        2, 40, 320, methods, "random", figures, paired, nothing, nothing, nothing, nothing, (HOSTILE,)
    )
    page = Page(comparison._repr_html_())
    assert page.lines[0] == ["figure", "random", "less"]
    assert page.lines[1] == ["target loss", "1 (1 to 1)", "0.6 (0.5 to 0.7); -0.4, p = 0.16"]
    assert HOSTILE in page.text
    assert set(page.tags) <= ALLOWED


def test_plain_python_stays_silent_and_pays_for_no_chart(made):
    script = f"""
import sys
from pathlib import Path
from dataflex_pipeline import Run
from dataflex_pipeline.pipeline.table import Table
run = Run(r"{made[0].folder.parent / "new"}")
table = Table(Path(r"{made[0].round(1).scores("loss")}"), "", by="score")
table.top(3)
run, table
assert not {{"altair", "duckdb", "IPython"}} & set(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
