"""The model of a checkpoint, opened to take the gradients of rows: what every feature of gradients shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.source import number_ingredients as number_ingredients

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex_pipeline.gradients.adam import AdamUpdate, Rule
    from dataflex_pipeline.gradients.capture import GradientCapture, GradientConsumer

COLUMNS = ("row", "row_id", "input_ids", "labels", "valid", "reason", "group")
"""What gradients of rows are computed from."""
NOT_FINITE = "the loss or its gradient is not finite"


def check_moments(side: Literal["adam", "sgd"], need: api.Need, config: Any) -> None:
    """Refuse Adam's update of the model as it is given.

    Raises:
        ConfigError: no warm-up makes the optimizer's moments.
    """
    if side == "adam" and need.checkpoint == 0 and not config.warmup_step:
        raise ConfigError(
            "warmup_step is 0, and gradient_type is adam.",
            "Adam's update of a gradient needs the optimizer's moments, which only training makes.",
            "Set warmup_step=20, a short warm-up that is trained first, or gradient_type: sgd (as "
            "less.gradient_type=sgd), which compares plain gradients.",
        )


@dataclass(frozen=True)
class Loaded:
    """A model, loaded for gradients.

    Attributes:
        model: in eval mode. device: it is on.
        trainable: the parameters that gradients are taken of, by name; a capture switches them off.
        given, config, progress: what it was loaded for.
    """

    model: Any
    device: str
    trainable: dict[str, Tensor]
    given: api.FeatureInput
    config: Any
    progress: api.Progress

    def adam_updates(self, side: Literal["adam", "sgd"], rule: Rule) -> Mapping[str, AdamUpdate] | None:
        """Return the Adam update of every parameter; None for plain gradients.

        Raises:
            UserError: there is no checkpoint, or its optimizer is of another model.
        """
        if side == "sgd":
            return None
        from dataflex_pipeline.gradients.adam import AdamUpdate, match_states
        from dataflex_pipeline.models.optimizer_states import adam_states

        if self.given.checkpoint is None:
            raise UserError(
                "Adam gradients were asked for without a checkpoint.",
                "Adam's update of a gradient needs the optimizer's moments, which only training makes.",
                "Run the warm-up first, or set gradient_type: sgd.",
            )
        states = match_states(self.trainable.items(), adam_states(self.given.checkpoint))
        return {name: AdamUpdate.of(state, rule, self.device) for name, state in states.items()}

    @contextmanager
    def capturing(
        self, consumer: GradientConsumer, *, counts_rows: bool = True
    ) -> Iterator[tuple[GradientCapture, Room]]:
        """Open the model to take gradients; yield the capture and the room for its batches.

        Args:
            consumer: takes them. counts_rows: whether a batch's sequences are rows, which progress counts.
        """
        from dataflex_pipeline.gradients.capture import GradientCapture

        config, say = self.config, self.progress.say
        checkpointing = config.gradient_checkpointing is True
        counted = (self.progress.advance,) if counts_rows else ()
        with GradientCapture(self.model, consumer, say, checkpointing=checkpointing) as capture:
            tokens, folder = config.score_batch_tokens, self.given.folder
            yield capture, Room(tokens, say, capture.save_memory, folder, *counted)


def load(given: api.FeatureInput, config: Any, progress: api.Progress) -> Loaded:
    """Load base and adapter of a checkpoint once."""
    from dataflex_pipeline.models.adapters import load_for_gradients
    from dataflex_pipeline.models.base import resolve_device

    device = resolve_device(config.device)
    model = load_for_gradients(config, given.checkpoint, device, progress.say)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Loaded(model, device, trainable, given, config, progress)
