"""The losses of responses by themselves, without what was asked: what ifd compares the losses with.

    l_i = (1 / T_i) sum over labelled tokens t of -log p(t | the template's beginning, the response before t)

The tokens, and so T_i, are those of the losses feature; each response of a row of several turns stands alone,
behind the same beginning (data/chat/beginning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.losses import mean_losses
from dataflex_pipeline.features.responses import losses_of_valid, mean_losses_alone, without_too_long
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.source import number_ingredients
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import LOSSES, REASON, ROW, ROW_ID, VALID, column

LOSSES_ALONE = pa.schema(
    [
        ROW,
        ROW_ID,
        column("loss", pa.float64(), "mean negative log-likelihood of the response alone, nats per token"),
        column("n_tokens", pa.int32(), LOSSES.field("n_tokens").metadata[b"description"].decode()),
        VALID,
        REASON,
    ]
)
NOT_FINITE = "the loss of the response alone is not finite"


class ResponseLosses(api.Feature):
    """Each row's mean loss over its response tokens, the responses by themselves."""

    schema = LOSSES_ALONE
    input_columns = ("row", "row_id", "input_ids", "labels", "valid", "reason")

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward pass: an upper bound, since responses are shorter than rows."""
        return row_flops(self.config, tokens, passes=1)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the checkpoint once; yield the function from rows to losses."""
        import torch

        from dataflex_pipeline.data.chat.beginning import beginning_ids
        from dataflex_pipeline.data.chat.labelled import ChatFormat
        from dataflex_pipeline.data.chat.templates import named_template
        from dataflex_pipeline.data.limits import TokenLimits
        from dataflex_pipeline.models.base import load_for_scoring, resolve_device
        from dataflex_pipeline.models.token_losses import token_losses
        from dataflex_pipeline.models.tokenizer import load_tokenizer

        template = self.config.template
        named = None if template is None else named_template(template)
        beginning = beginning_ids(ChatFormat(load_tokenizer(self.config), named))
        model = load_for_scoring(self.config, given.checkpoint, resolve_device(self.config.device))
        limits = TokenLimits.of(model.config)
        positions = limits.positions if limits.hard else None
        room = Room(
            self.config.score_batch_tokens, progress.say, folder=given.folder, advance=progress.advance
        )
        with torch.inference_mode(), token_losses(model, progress.say) as losses:
            means = partial(mean_losses, losses, max_tokens=room)
            alone = partial(mean_losses_alone, beginning=beginning, mean_losses=means)

            def compute(rows: pa.Table) -> pa.Table:
                fitting = without_too_long(rows, beginning, positions)
                return self.table(fitting, losses_of_valid(fitting, alone), NOT_FINITE)

            yield compute
