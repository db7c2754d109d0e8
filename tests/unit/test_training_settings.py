"""Which settings a checkpoint is made from."""

from __future__ import annotations

import pytest

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.pipeline.train import TRAINING_KEYS, _training_settings
from dataflex_pipeline.store.fingerprint import changes, digest


def differing(settings, **others):
    old, new = _training_settings(Config(**settings)), _training_settings(Config(**(settings | others)))
    assert (digest(old) == digest(new)) == (changes(old, new) == [])
    return changes(old, new)


def test_logging_steps_counts_only_where_it_says_when_to_evaluate():
    steps = {"eval_strategy": "steps", "logging_steps": 5}
    assert differing(steps, logging_steps=7) == ["eval_steps: 5 -> 7"]
    assert differing(steps, eval_steps=5) == []  # the same evaluations
    assert differing(steps | {"eval_steps": 3}, logging_steps=7) == []
    assert differing({"eval_strategy": "epoch"}, logging_steps=7) == []
    assert differing({"eval_strategy": "no"}, logging_steps=7) == []


def test_the_attention_kernel_counts():
    for settings, other in (({}, "eager"), ({"attn_implementation": "eager"}, "sdpa")):
        (line,) = differing(settings, attn_implementation=other)
        assert line.startswith("attn_implementation: ")


@pytest.mark.parametrize("settings", [{}, {"eval_strategy": "steps", "eval_steps": 3}])
def test_other_settings_are_taken_as_they_are(settings):
    config = Config(**settings)
    assert _training_settings(config) == {name: getattr(config, name) for name in TRAINING_KEYS}
