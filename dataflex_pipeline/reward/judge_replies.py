"""The score in a judge's reply, read strictly: one number that can be meant, or none.

What follows the last ``</think>`` (chat templates may open that block themselves), or else the whole reply,
is read; the first rule that applies decides:

1. A JSON object (also in a code fence): its ``score``, a number or text as in rule 3.
2. A label (score, rating, grade, reward; in Chinese 得分, 评分, 分数) followed by a colon or equals sign:
   behind every such label stands a number, and all of them agree.
3. The first or the last line is a number and nothing else; where both are, they agree.

A number is written in digits with an optional decimal point, and may be followed by ``/n``, ``out of n`` or
``%``: ``8/10``, ``8 out of 10`` and ``80%`` are 0.8 on any scale; a bare number counts on the scale 0 to
``max_score`` that the prompt named. What lies outside 0..1 after that is no score: ``NaN``, ``eight``,
``0,8``, ``1e-1``, ``0-1`` and pages of HTML are none either.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_SCORE = rf"(?P<value>{_NUMBER})(?:\s*(?:/|out of)\s*(?P<of>{_NUMBER})|\s*(?P<percent>%))?"
_END = r"(?!\w|[.,:][0-9]|\s*[/%]|\s*[-–~]\s*[.0-9]|\s*(?:to|out of)\b)"
"""What may not follow a number, because it would be the head of something else: 0,8  1e-1  0-1  8/ten."""
_LABEL = re.compile(
    r"(?:\b(?:score|rating|grade|reward)\b|得分|评分|分数)\s*(?:\([^()]{0,40}\)\s*)?[:=：]\s*", re.IGNORECASE
)
_LABELLED = re.compile(_SCORE + _END)
_ALONE = re.compile(_SCORE)
_THOUGHT = "</think>"
_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)
_MARKUP = re.compile(r"\*\*|__|`")

Parsed = tuple[float | None, str | None]
"""The score as a share of the best one, 0..1, or None with the reason."""


def parse_score(reply: str, max_score: float = 1.0) -> Parsed:
    """Return the score in a judge's reply as a share of ``max_score``, or None and why there is none."""
    text = reply.rpartition(_THOUGHT)[2].strip()
    if text.startswith("<think>"):
        return None, "the judge was cut off while it was thinking"
    if not text:
        return None, "the judge's reply is empty"
    if re.match(r"<(?:!doctype|html)\b", text, re.IGNORECASE):
        return None, "the judge's reply is a page of HTML"
    found = _from_json(text, max_score)
    if found is not None:
        return found
    plain = _MARKUP.sub("", text)
    labels = list(_LABEL.finditer(plain))
    if labels:
        return _agreed([_LABELLED.match(plain, label.end()) for label in labels], max_score)
    lines = [line.strip().removesuffix(".") for line in plain.splitlines() if line.strip()]
    matches = [match for line in dict.fromkeys((lines[0], lines[-1])) if (match := _ALONE.fullmatch(line))]
    return _agreed(matches, max_score) if matches else (None, "the judge's reply holds no score")


def _from_json(text: str, max_score: float) -> Parsed | None:
    """Return the score of a JSON object; None where the text is none."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_int=float)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    score = value.get("score")
    if isinstance(score, str):
        match = _ALONE.fullmatch(score.strip())
        return _agreed([match], max_score)
    if not isinstance(score, float):
        return None, "the judge's reply is JSON without a score"
    return _on_scale(score / max_score)


def _agreed(matches: Sequence[re.Match[str] | None], max_score: float) -> Parsed:
    shares = []
    for match in matches:
        if match is None:
            return None, "the judge's score is not a number"
        share, reason = _share(match, max_score)
        if share is None:
            return None, reason
        shares.append(share)
    if len(set(shares)) > 1:
        return None, "the judge's reply holds scores that differ"
    return shares[0], None


def _share(match: re.Match[str], max_score: float) -> Parsed:
    best = 100.0 if match["percent"] else float(match["of"]) if match["of"] else max_score
    if best <= 0:
        return None, "the judge's score is out of nothing"
    return _on_scale(float(match["value"]) / best)


def _on_scale(share: float) -> Parsed:
    if math.isnan(share):
        return None, "the judge's score is not a number"
    if not 0 <= share <= 1:
        return None, "the judge's score is outside the scale"
    return share + 0.0, None  # -0.0 becomes 0.0
