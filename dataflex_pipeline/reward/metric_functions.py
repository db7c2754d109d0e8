"""The shipped metrics: functions of (prompt, completion, reference).

    exact_match  1 where completion and reference are equal, spaces at both ends aside
    contains     1 where the reference stands in the completion, spaces at its ends aside
    f1           F-measure of the words in common, each as often as in both (Rajpurkar et al. 2016, SQuAD,
                 section 6.1; here over the words of `Words`, so any script counts and no article is dropped)
    rouge_l      F-measure of the longest common subsequence of words (Lin 2004, ROUGE, section 3.1)
    chrf         character n-gram F-score, 0..1 (Popovic 2015)
    bleu         sentence BLEU with effective order, 0..1 (Papineni et al. 2002; sacrebleu's tokenizers)
    valid_json   1 where the whole completion is JSON (needs no reference)
    numeric      1 where the last number of the completion equals the last one of the reference, within 1e-6
                 of it; 0 where the completion has none

All but valid_json leave a row without a reference unscored.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.settings import MetricSettings

Metric = Callable[[str, str, str | None], float | None]
"""(prompt, completion, reference) -> reward, None where the answer cannot be scored."""

# A sign counts where no word ends before it: 10-2 holds 10 and 2.
_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# A CJK character or kana is a word of its own; other words are runs of letters and digits.
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)
NUMERIC_TOLERANCE = 1e-6


def exact_match(prompt: str, completion: str, reference: str) -> float:
    """Return 1 where completion and reference are the same text."""
    return float(completion.strip() == reference.strip())


def contains(prompt: str, completion: str, reference: str) -> float:
    """Return 1 where the reference stands somewhere in the completion."""
    return float(reference.strip() in completion)


def valid_json(prompt: str, completion: str, reference: str | None) -> float:
    """Return 1 where the whole completion is JSON; NaN and Infinity are not."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(completion, parse_constant=refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def f1(prompt: str, completion: str, reference: str) -> float:
    """Return the F-measure of the words that completion and reference have in common."""
    found, wanted = (Counter(Words().tokenize(text)) for text in (completion, reference))
    if not found or not wanted:
        return float(found == wanted)
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total())


def numeric(prompt: str, completion: str, reference: str) -> float | None:
    """Return 1 where the last numbers agree; None where the reference has none."""
    wanted, found = _last_number(reference), _last_number(completion)
    if wanted is None:
        return None
    return float(found is not None and math.isclose(found, wanted, rel_tol=NUMERIC_TOLERANCE, abs_tol=1e-12))


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


class Words:
    """The tokenizer of ROUGE for any script; on ASCII the same as rouge-score's own, which drops the rest."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text in lower case."""
        return _WORDS.findall(text.lower())


def _rouge_l(settings: MetricSettings) -> Metric:
    with _installed("rouge_l", "rouge-score"):
        from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return lambda prompt, completion, reference: float(scorer.score(reference, completion)["rougeL"].fmeasure)


def _chrf(settings: MetricSettings) -> Metric:
    with _installed("chrf", "sacrebleu"):
        from sacrebleu.metrics import CHRF
    scorer = CHRF()
    return lambda prompt, completion, reference: scorer.sentence_score(completion, [reference]).score / 100


def _bleu(settings: MetricSettings) -> Metric:
    with _installed("bleu", "sacrebleu"):
        from sacrebleu.metrics import BLEU
    try:
        scorer = BLEU(tokenize=settings.bleu_tokenize, effective_order=True)
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"{PLACE}.metric.bleu_tokenize: {settings.bleu_tokenize} cannot be used.",
            f"sacrebleu says: {str(error).strip()}",
            f"Its tokenizers are: {', '.join(sorted(BLEU.TOKENIZERS))}.",
        ) from error
    return lambda prompt, completion, reference: scorer.sentence_score(completion, [reference]).score / 100


@contextmanager
def _installed(metric: str, package: str) -> Iterator[None]:
    """Turn a missing package into an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{PLACE}.metric.name: {metric} was asked for.",
            f"It is computed by the package {package}, which is not installed here.",
            "pip install 'dataflex-pipeline[metrics]', or choose another metric.",
        ) from error


SHIPPED: dict[str, Callable[[MetricSettings], Any]] = {
    "exact_match": lambda settings: exact_match,
    "contains": lambda settings: contains,
    "f1": lambda settings: f1,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
    "bleu": _bleu,
    "valid_json": lambda settings: valid_json,
    "numeric": lambda settings: numeric,
}
NEEDS_NO_REFERENCE = ("valid_json",)


def check_shipped(name: str) -> None:
    """Check that there is a shipped metric of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHIPPED:
        raise ConfigError(
            f"{PLACE}.metric.name: {name} is not a metric.{did_you_mean(name, SHIPPED)}",
            f"The metrics are: {', '.join(SHIPPED)}.",
            "Choose one of them, or give module:function (or file.py:function) of your own.",
        )


def shipped_metric(settings: MetricSettings) -> Metric:
    """Return the shipped metric that the settings name.

    Raises:
        ConfigError: there is none of that name, or what computes it is not installed.
    """
    check_shipped(settings.name)
    metric: Metric = SHIPPED[settings.name](settings)
    return metric if settings.name in NEEDS_NO_REFERENCE else _with_reference(metric)


def _with_reference(metric: Metric) -> Metric:
    def score(prompt: str, completion: str, reference: str | None) -> float | None:
        return None if reference is None else metric(prompt, completion, reference)

    return score
