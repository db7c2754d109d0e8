"""A report as one HTML page that needs nothing else: its charts' library, its script and its rows are inside.

The page may ask for nothing: its content security policy allows the scripts that it holds, by their digests,
and no request. What the data holds is text to it: rows are JSON in which no tag can end or begin, and the
script writes them as text. Vega runs without eval (with its own interpreter of expressions).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dataflex_pipeline.reports.likeness import TOP, is_constant
from dataflex_pipeline.reports.page.findings import Drawn
from dataflex_pipeline.reports.page.listed_rows import listed_rows
from dataflex_pipeline.store.unseen import visible

HERE = Path(__file__).parent
MOST_BYTES = 4_800_000
"""Bytes of a page at most; the texts of rows are cut to fit."""
DATA_BYTES = 200_000
"""Bytes that rows have at least, whatever else is on the page."""


def page(found: dict[str, Any]) -> str:
    """Return the page for what `findings.findings` found of a run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_seen,
    )
    environment.filters |= {"number": _number, "seconds": _seconds, "percent": _percent}
    environment.tests["constant"] = is_constant
    own = [(HERE / name).read_text(encoding="utf-8") for name in ("render.js", "charts.js")]
    scripts = [library(), *own]
    template = environment.get_template("render.html.jinja")
    rest = dict(
        found,
        scripts=scripts,
        style=(HERE / "render.css").read_text(encoding="utf-8"),
        policy=policy(scripts),
        charts=[_chart(number, each) for number, each in enumerate(found["charts"])],
        specs=embedded({f"chart-{number}": each.spec for number, each in enumerate(found["charts"])}),
        top=TOP,
        settings_text=yaml.safe_dump(found["settings"], sort_keys=False, allow_unicode=True),
        provenance_text=json.dumps(found["provenance"], indent=2, ensure_ascii=False),
    )
    without = len(template.render(**rest, data="{}", n_rows=0).encode())
    data, n_rows = listed_rows(found["rows"], max(MOST_BYTES - without, DATA_BYTES), embedded)
    return template.render(**rest, data=data, n_rows=n_rows)


def library() -> str:
    """Return the script of Vega, Vega-Lite and the embedder, of the version that Altair writes charts for."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    text: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    return text.replace("</script", "<\\/script")


def policy(scripts: Sequence[str]) -> str:
    """Return a content security policy that allows some scripts and no request."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    own = f"script-src {allowed}; style-src 'unsafe-inline'"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def embedded(value: Any) -> str:
    """Return JSON that no tag, comment or script can begin or end in."""
    text = json.dumps(_shown(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _shown(value: Any) -> Any:
    """Return plain values whose texts hold no character that is not seen."""
    if isinstance(value, Mapping):
        return {visible(str(key)): _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return visible(value) if isinstance(value, str) else value


def _chart(number: int, drawn: Drawn) -> Mapping[str, Any]:
    return {"id": f"chart-{number}", "name": drawn.name, "title": drawn.title, "says": drawn.says} | {
        "column": drawn.column
    }


def _seen(value: Any) -> Any:
    """Return a value of the page as it may be written: control characters in texts made visible."""
    return visible(value) if type(value) is str else value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def _seconds(value: float | None) -> str:
    """Return a duration in brackets, or nothing."""
    if value is None:
        return ""
    if value < 120:
        return f" ({value:.1f} s)"
    return f" ({value / 60:.0f} min)" if value < 7200 else f" ({value / 3600:.1f} h)"
