"""Losses by a model of its own (``score_model``): of whole rows, or of their responses by themselves.

The model reads each row as it would be prepared for it: written with its own chat template (or the named one
of ``score_template``), in its own tokens, cut at ``cutoff_len`` or at the last position that it has. A
prepared row is written anew from its turns. Where the run's own template does not get the row's tokens back
from them, something is not in them (definitions of tools, reasoning, marks of single turns), and the row is
not valid here, by name.

Formulas: features/losses.py and features/response_losses.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.data.chat.beginning import beginning_ids
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.conversation import Conversation, Message, RowError
from dataflex_pipeline.data.limits import TokenLimits
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.losses import mean_losses
from dataflex_pipeline.features.responses import losses_of_valid, mean_losses_alone, set_aside
from dataflex_pipeline.features.score_params import ScoredParams
from dataflex_pipeline.models.beside import ModelBeside
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.weights import stored_weights
from dataflex_pipeline.schemas import IGNORED, LOSSES, REASON, ROW, ROW_ID, VALID, column

KEY = "score_model"
NOT_IN_TURNS = (
    "not all of the row is in its turns (tools, reasoning, turns that are not trained on): score_model "
    "cannot be shown it"
)
Encoded = tuple[list[int], list[int]]
"""Token ids and labels of a row."""


class ScoreLosses(api.Feature):
    """Each row's mean loss over its response tokens, by a model that is not the run's."""

    Params = ScoredParams
    params: ScoredParams
    uses_model = False
    input_columns = ("row", "row_id", "messages", "input_ids", "labels", "valid", "reason")
    schema = pa.schema(
        [
            ROW,
            ROW_ID,
            LOSSES.field("loss"),
            column("n_tokens", pa.int32(), "response tokens that the mean is over, as score_model has them"),
            VALID,
            REASON,
        ]
    )

    @cached_property
    def model(self) -> ModelBeside:
        """The model that scores."""
        return ModelBeside(self.params.score_model or "", self.params.score_revision, KEY, self.config)

    def ingredients(self) -> dict[str, Any]:
        """Return what decides the losses, in place of the parameters: the model's files count."""
        template = self.params.score_template
        text = None if template is None else named_template(template).text
        return {"params": {**self.model.identity, "template": text, "alone": self.params.alone}}

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check that the model is there, and can be written rows for."""
        self.model.check()
        self._chat()

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward pass of the model that scores."""
        found = stored_weights(self.params.score_model or "", self.params.score_revision)
        return 0.0 if found is None else 2.0 * found.parameters * tokens

    def _chat(self) -> ChatFormat:
        """Return how the model's rows are written."""
        template, tokenizer = self.params.score_template, self.model.tokenizer
        if template is None and not tokenizer.chat_template:
            raise ConfigError(
                f"score_model is {self.params.score_model}, whose tokenizer has no chat template.",
                "There is no telling how it should be shown prompts and responses.",
                "Set score_template to the named template of its family, or to plain for a model that was "
                "never tuned on conversations.",
            )
        return ChatFormat(tokenizer, None if template is None else named_template(template))

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the model once; yield the function from rows to losses."""
        import torch

        from dataflex_pipeline.models.base import resolve_device
        from dataflex_pipeline.models.token_losses import token_losses
        from dataflex_pipeline.models.tokenizer import load_tokenizer

        chat, template = self._chat(), self.config.template
        own = ChatFormat(load_tokenizer(self.config), None if template is None else named_template(template))
        model = self.model.load(resolve_device(self.config.device), progress.say)
        limits = TokenLimits.of(model.config)
        longest = self.config.cutoff_len
        if limits.hard and limits.positions is not None:
            longest = min(longest, limits.positions)
        writer = _Writer(
            own, chat, self.config.mask_history, self.config.cutoff_len, longest, limits.vocabulary
        )
        beginning = beginning_ids(chat, "score_template") if self.params.alone else ()
        room = Room(
            self.config.score_batch_tokens, progress.say, folder=given.folder, advance=progress.advance
        )
        with torch.inference_mode(), token_losses(model, progress.say) as by_token:
            losses = partial(mean_losses, by_token, max_tokens=room)
            if self.params.alone:
                losses = partial(mean_losses_alone, beginning=beginning, mean_losses=losses)

            def compute(rows: pa.Table) -> pa.Table:
                written = writer.write(rows)
                return self.table(written, losses_of_valid(written, losses), "the loss is not finite")

            yield compute
        if writer.cut:
            progress.say(
                f"{writer.cut} rows are longer than {longest} tokens of score_model: scored up to there"
            )


@dataclass
class _Writer:
    """Writes prepared rows anew for another model.

    Attributes:
        own: how the run's rows are written. other: the same for the model.
        mask_history: whether only the last answer carries labels. cutoff_len: tokens of the run's rows.
        longest: tokens of the model's. vocabulary: rows of its embedding, where that is known.
        cut: rows that were longer, so far.
    """

    own: ChatFormat
    other: ChatFormat
    mask_history: bool
    cutoff_len: int
    longest: int
    vocabulary: int | None
    cut: int = 0

    def write(self, rows: pa.Table) -> pa.Table:
        """Return rows with the model's token ids and labels; a row that cannot be written is not valid."""
        valid = np.flatnonzero(rows.column("valid").to_numpy(zero_copy_only=False)).tolist()
        given = dict(zip(valid, rows.take(pa.array(valid, pa.int64())).to_pylist(), strict=True))
        turns = {place: _conversation(row["messages"]) for place, row in given.items()}
        reasons: dict[int, str] = {}
        for place, found in self._encoded(self.own, turns).items():
            if not self._is_row(found, given[place]):
                reasons[place] = NOT_IN_TURNS
                del turns[place]
        tokens: dict[int, Encoded] = {}
        for place, found in self._encoded(self.other, turns).items():
            cut = found if isinstance(found, str) else self._cut(*found)
            if isinstance(cut, str):
                reasons[place] = cut
            else:
                tokens[place] = cut
        return set_aside(_with_tokens(rows, tokens), reasons)

    def _encoded(self, chat: ChatFormat, turns: Mapping[int, Conversation]) -> dict[int, Encoded | str]:
        """Return token ids and labels of conversations as a template writes them, or why it cannot."""
        found: dict[int, Encoded | str] = {}
        pieces = {}
        for place, conversation in turns.items():
            try:
                pieces[place] = chat.pieces(conversation, self.mask_history)
            except RowError as problem:
                found[place] = f"score_model: {problem}"
        return found | dict(zip(pieces, chat.encode(list(pieces.values())), strict=True))

    def _is_row(self, found: Encoded | str, row: Mapping[str, Any]) -> bool:
        """Whether the run's template gets a row's tokens back from its turns."""
        if isinstance(found, str):
            return False
        return [part[: self.cutoff_len] for part in found] == [row["input_ids"], row["labels"]]

    def _cut(self, ids: list[int], labels: list[int]) -> Encoded | str:
        """Return a row's tokens up to the longest that the model takes, or why there is nothing to score."""
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            return f"a token of it is beyond the {self.vocabulary} that score_model has vectors for"
        self.cut += len(ids) > self.longest
        if all(label == IGNORED for label in labels[1 : self.longest]):
            return f"no response token within the {self.longest} tokens that score_model is given"
        return ids[: self.longest], labels[: self.longest]


def _conversation(messages: Sequence[Mapping[str, str]]) -> Conversation:
    return Conversation(tuple(Message(turn["role"], turn["content"]) for turn in messages))


def _with_tokens(rows: pa.Table, tokens: Mapping[int, Encoded]) -> pa.Table:
    """Return rows with other token ids and labels, by place; without any where there are none."""
    for number, name in enumerate(("input_ids", "labels")):
        values = [tokens[place][number] if place in tokens else [] for place in range(rows.num_rows)]
        column = pa.array(values, pa.list_(pa.int32()))
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows
