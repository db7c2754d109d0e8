"""The rewards feature: a judge's score, a reward model's output or a metric for each sampled answer.

One line per target row and sample, in the order of the generations table. An answer that was drawn several
times for a prompt, or equals the row's own, is judged once (inside a part). Every reward is written to a
journal in the table's folder as soon as it is known, so that after a kill nothing is asked, or paid, twice; a
part's journal goes away once the part is there. A reply in words that holds no score is asked for once more;
then the line is unscored, with the judge's words beside it, and never counts as 0.

``seconds``, and ``attempts`` at a remote endpoint, tell what happened and differ between runs; no other table
is made from them. All else is identical however often the work was cut off, except what a remote judge says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.judging import remove_finished
from dataflex_pipeline.features.params import JudgedParams
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.features.reward_parts import REWARDS, RewardParts
from dataflex_pipeline.reward.journal import JOURNALS
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.reward.settings import Settings, identity_of


class Rewards(api.Feature):
    """The reward of every sampled answer."""

    input_columns = ("row", "row_id", "messages", "valid", "reason")
    schema = REWARDS
    side_files = JOURNALS

    Params = JudgedParams
    params: JudgedParams

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        self.settings: Settings = read_settings(params.reward_model_backend, params.reward_backend_params)

    @property
    def lines_per_row(self) -> int:
        """Samples per target row."""
        return make_feature(self._generations(api.Need("generations", "target")), self.config).lines_per_row

    def _generations(self, need: api.Need) -> api.Need:
        return replace(need, feature="generations", kind=None, params=self.params.generations)

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the answers that are to be judged."""
        return {"generations": self._generations(need)}

    def ingredients(self) -> dict[str, Any]:
        """Return what of the chosen backend's settings decides a reward, and its model or function."""
        return {"backend": identity_of(self.settings, self.config)}

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check what the backend needs beside its settings: the API's key, the judge's files, a function.

        Raises:
            UserError: one of them is not there, or cannot be used.
        """
        self.settings.check()

    def reach(self) -> Sequence[str]:
        """Try the endpoint, where there is one."""
        return self.settings.reach()

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the backend once; yield the function from target rows to rewards.

        Raises:
            DataflexError: the backend finally failed; every reply that had arrived is in the journal.
        """
        if given.folder is None:
            raise ValueError("rewards are kept in the folder of their table, and none was given")
        remove_finished(given.folder)
        with self.settings.rewarder(self.config, progress.say) as rewarder:
            parts = RewardParts(rewarder, self.settings, self.params.reference, given, progress)
            yield parts.part
        parts.say_unscored()
        remove_finished(given.folder)
