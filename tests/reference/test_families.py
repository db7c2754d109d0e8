"""The family matrix: losses, LESS and two rounds of training of many families against plain loops.

What a family's figures are and how they are made: families/check.py; what is right: families/oracle.py.
Families that are not quick are tried by ``make test-families``; ``make families`` writes docs/families.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from families import oracle
from families.check import Trial, measure
from families.models import ALL, KINDS, NAMED
from families.table import NAMES, REPOSITORY

from dataflex_pipeline.errors import UserError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the families' models and runs go."""
    return tmp_path_factory.mktemp("families")


def cases():
    for family in ALL:
        for kind in KINDS:
            marks = [] if family.quick else [pytest.mark.families]
            yield pytest.param(family, kind, id=f"{family.title}-{kind}", marks=marks)


@pytest.mark.parametrize(("family", "kind"), cases())
def test_numbers_are_those_of_plain_loops(family, kind, folder):
    if kind in family.refused:
        with pytest.raises(UserError) as refusal:
            measure(family, kind, folder)
        assert family.model_type in str(refusal.value)
        assert family.refused[kind] in str(refusal.value)
        return
    assert measure(family, kind, folder).beyond() == {}


def test_the_matrix_has_the_families_that_people_fine_tune():
    assert {family.model_type for family in NAMED} == {
        *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "glm4", "granite", "olmo2"),
        *("gpt2", "gpt_neox", "falcon", "bloom", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba"),
        "falcon_h1",
    }
    assert len({family.title for family in ALL}) == len(ALL)


def by_title(title):
    return next(family for family in ALL if family.title == title)


OWN = [
    ("Gemma 2", {"attn_logit_softcapping": None}),
    ("Gemma 2", {"final_logit_softcapping": None}),
    ("Gemma 2", {"sliding_window": 64}),
    ("Mistral", {"sliding_window": None}),
    ("Granite", {"logits_scaling": 1.0}),
    ("Granite", {"attention_multiplier": 1.0}),
    ("GPT-OSS", {"sliding_window": 64}),
    ("Mixtral", {"num_experts_per_tok": 1}),
    ("Falcon-H1", {"lm_head_multiplier": 1.0}),
]


@pytest.mark.parametrize(("title", "without"), OWN, ids=[f"{title}-{next(iter(w))}" for title, w in OWN])
def test_what_a_family_does_differently_is_felt(title, without, folder):
    """A model that ignored its own soft cap, window or multiplier could not pass the matrix."""
    family = by_title(title)
    trial = Trial(family, "full", folder / "felt" / next(iter(without)))
    whole, changed = (
        oracle.row_losses(oracle.load(trial.model, **settings).eval(), trial.rows)
        for settings in ({}, without)
    )
    assert np.abs(whole - changed).max() > 1e-2


def test_the_balancing_loss_is_felt(folder):
    balanced = by_title("Mixtral, with its balancing loss")
    trial = Trial(replace(balanced, balancing=False), "full", folder / "unbalanced")
    with_it, without = Trial(balanced, "full", folder / "balanced").loop, trial.loop
    assert abs(with_it.losses[0] - without.losses[0]) > 1e-2


def test_the_page_has_the_line_of_every_family_and_none_is_wrong():
    page = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")
    head, *lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    assert cells == [
        [family.title, f"`{family.model_type}`", NAMES[kind]] for family in ALL for kind in KINDS
    ]
    assert head.startswith("| Family |")
    assert "**" not in "".join(lines)
