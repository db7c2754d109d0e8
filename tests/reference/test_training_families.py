"""What training a family that is stored or computed otherwise says, and that it goes on exactly after a kill.

That its numbers are right: tests/reference/test_families.py.
"""

from __future__ import annotations

import pytest
from families.models import ALL, make_family
from tiny_training import Listener, assert_same, log_of, make_config, make_pool, states, train

from dataflex_pipeline.training import read_marker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool") / "pool")


def config_of(title, tmp_path, **settings):
    (family,) = [family for family in ALL if family.title == title]
    return make_config(make_family(family, tmp_path / "models"), **settings)


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


class Killer(Listener):
    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def advance(self, n):
        self.left -= n
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("title", ["Mixtral", "GPT-NeoX, Pythia"])
def test_weights_stored_under_other_names_go_on_after_a_kill(title, pool, tmp_path):
    config = config_of(title, tmp_path, finetuning_type="full", save_steps=2)
    train(tmp_path / "calm", range(2), config, pool, steps=5)
    train(tmp_path / "killed", [0], config, pool, steps=5)
    with pytest.raises(Killed):
        train(tmp_path / "killed", [1], config, pool, progress=Killer(4), steps=5)
    assert (tmp_path / "killed/round-01/training/checkpoint-8").is_dir()
    train(tmp_path / "killed", [1], config, pool, steps=5)
    assert_same(*(states(tmp_path / name / "round-01/checkpoint") for name in ("calm", "killed")))
    assert log_of(tmp_path / "killed", 1) == log_of(tmp_path / "calm", 1)


SAID = {
    "RecurrentGemma": "TRL's fused head does not compute this model's logits: the loss comes from the "
    "model's own logits, which takes more memory.",
    "Gemma 2": "The model soft-caps its attention scores, which sdpa leaves out: it is run with eager "
    "attention.",
    "Mixtral": "The load-balancing loss of the experts is added, 0.02 times (router_aux_loss_coef); the "
    "rows' weights do not change it.",
    "Llama": None,
}


@pytest.mark.parametrize("title", list(SAID))
def test_how_a_family_is_trained_is_said_and_recorded(title, pool, tmp_path):
    heard = Listener()
    train(tmp_path, [0], config_of(title, tmp_path, finetuning_type="full"), pool, progress=heard)
    recorded = read_marker(tmp_path / "round-00" / "checkpoint").result["notices"]
    assert recorded == ([] if SAID[title] is None else [SAID[title]])
    assert all(heard.lines.count(line) == 1 for line in recorded)


def test_what_trl_sets_in_a_configuration_is_not_saved(pool, tmp_path):
    """A checkpoint that asked for router logits would compute them in every scoring."""
    import json

    config = config_of("Mixtral", tmp_path, finetuning_type="full", router_aux_loss_coef=0.5)
    train(tmp_path, [0], config, pool)
    saved = json.loads((tmp_path / "round-00/checkpoint/config.json").read_text())
    assert (saved["output_router_logits"], saved["router_aux_loss_coef"]) == (False, 0.02)
