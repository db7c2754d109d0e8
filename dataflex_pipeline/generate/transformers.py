"""Completions drawn with transformers: batches padded on the left, a key-value cache, a stream per sample.

A token is drawn as vLLM draws it, up to the random numbers: the logits are divided by the temperature, all
but the ``top_k`` likeliest are taken out, then all that the likeliest tokens of probability ``top_p`` do not
need; temperature 0 takes the likeliest token. What is left is drawn by inverting its distribution function at
a uniform number in [0, 1). Sample s takes its t-th number from the Philox stream keyed with its own seed, so
a completion depends on its prompt and seed only, not on its batch, its place there, or the device. (Another
batch moves logits by rounding, about 1e-6 in fp32 and 1e-2 in bf16, and so a token with about that
probability.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dataflex_pipeline.generate import Completion, Prompt
from dataflex_pipeline.generate.settings import GenerationSettings
from dataflex_pipeline.models.batches import Sequences, padded
from dataflex_pipeline.models.room import Room, give_memory_back, memory_failure
from dataflex_pipeline.models.source import quiet

if TYPE_CHECKING:
    import torch

    from dataflex_pipeline.config.fields import Config

BATCH = 64
"""Completions drawn at the same time where nothing is said; fewer where they are long."""
COLD, COLDEST = 1e-6, 1e-30
"""Below the first temperature the largest logit is taken off before the division, which could be infinite in
float32; below the second all that is not the largest is gone anyway."""
END_WINDOW = 16
"""Tokens beyond those of the end text that are looked at for it: it may be written in other tokens."""


@dataclass
class _Sample:
    """A completion being drawn: its place among the prompts, its random numbers and what is drawn so far."""

    place: int
    uniforms: np.ndarray  # [room]
    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish: str = ""


class TransformersGenerator:
    """Draws completions with a transformers model; entering loads it, leaving frees its memory.

    Args:
        config: names the model, its precision and the device.
        checkpoint: folder of the adapter or of the whole model; None: the model before the warm-up.
        settings: how completions are drawn.
        say: told how many are drawn at the same time, where the memory decides.
        folder: of the table that is made, where that is agreed on; None: it is not.
    """

    def __init__(
        self,
        config: Config,
        checkpoint: Path | None,
        settings: GenerationSettings,
        say: Callable[[str], None] = quiet,
        folder: Path | None = None,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._settings = settings
        self._say = say
        self._room = Room(config.score_batch_tokens, say, folder=folder)
        self._most = settings.batch or BATCH
        self._model: Any = None
        self._accepted: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        from dataflex_pipeline.models.base import load_for_scoring, resolve_device

        device = resolve_device(self._config.device)
        self._model = load_for_scoring(self._config, self._checkpoint, device)
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._accepted = frozenset(inspect.signature(base.forward).parameters)
        return self

    def __exit__(self, *error: object) -> None:
        from dataflex_pipeline.models.base import free_memory

        self._model = None
        free_memory()

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Return one completion per prompt, in order; prompts of similar length are drawn together."""
        import torch

        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].token_ids))
        done: list[_Sample] = []
        with torch.inference_mode():
            if order:
                self._settle(prompts[order[0]])
            while len(done) < len(order):
                size = self._size(len(prompts[order[len(done)]].token_ids))
                places = order[len(done) : len(done) + size]
                failure = memory_failure(
                    lambda places=places: done.extend(self._batch([prompts[p] for p in places], places))  # type: ignore[misc]
                )
                if failure is not None:
                    self._shrink(len(places), failure)
        done.sort(key=lambda sample: sample.place)
        return [
            Completion(each.token_ids, self._settings.text(each.token_ids), each.finish, each.logprob)  # type: ignore[arg-type]
            for each in done
        ]

    def _settle(self, longest: Prompt) -> None:
        """Find how many tokens fit the memory, from a forward pass over the longest prompt and its answer."""
        if self._settings.batch:
            return
        ids = np.asarray(longest.token_ids)
        ids = np.concatenate([ids, np.repeat(ids[-1:], max(0, self._settings.room(len(ids))))])
        self._room.settle(Sequences(ids, ids, np.array([0, len(ids)])), self._probe, self._model.device)

    def _probe(self, sequences: Sequences, rows: np.ndarray) -> None:
        import torch

        ids, _, mask = (torch.from_numpy(a).to(self._model.device) for a in padded(sequences, rows))
        logits, _ = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), None)
        weights = cut_weights(logits, self._settings.top_k, self._settings.top_p)
        invert(weights, torch.zeros(len(rows), dtype=torch.float64, device=logits.device))

    def _size(self, longest: int) -> int:
        """Return how many completions to draw at the same time, the longest prompt having so many tokens.

        What is not set is bounded by ``score_batch_tokens``, since the key-value cache grows with the tokens.
        """
        if self._settings.batch:
            return self._most
        room = self._room.tokens // max(1, longest + self._settings.room(longest))
        return max(1, min(self._most, room))

    def _shrink(self, size: int, failure: str) -> None:
        """Draw half as many at the same time from here on.

        Raises:
            OutOfMemoryError: a single completion does not fit.
        """
        import torch

        give_memory_back()
        if size == 1:
            raise torch.OutOfMemoryError(failure)
        self._most = size // 2
        self._say(
            f"the memory was too small for {size} completions: {self._most} at the same time from here on "
            "(generation_batch_size)"
        )

    def _batch(self, prompts: Sequence[Prompt], places: Sequence[int]) -> list[_Sample]:
        """Draw one batch to the end; finished samples leave it as they finish."""
        import torch

        samples = [
            _Sample(place, uniforms(prompt.seed, self._settings.room(len(prompt.token_ids))))
            for prompt, place in zip(prompts, places, strict=True)
        ]
        alive = samples
        ids, mask = (torch.from_numpy(a).to(self._model.device) for a in left_padded(prompts))  # [B, T]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        while alive:
            logits, cache = self._forward(ids, mask, positions, cache)  # [B, V]
            drawn = self._draw(logits, alive)
            kept = [row for row, sample in enumerate(alive) if not sample.finish]
            if len(kept) < len(alive):
                alive = [alive[row] for row in kept]
                if not alive:
                    break
                rows = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(rows)
                mask, positions, drawn = mask[rows], positions[rows], drawn[rows]
            ids = drawn[:, None].to(mask.device)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return samples

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits after the last token, in float32, and the cache. [B, V]"""
        more = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in more.items() if name in self._accepted},
        )
        logits = output.logits[:, -1].float()
        # Apple's GPUs have no float64, which distribution functions are summed in
        return logits.cpu() if logits.device.type == "mps" else logits, output.past_key_values

    def _draw(self, logits: torch.Tensor, alive: Sequence[_Sample]) -> torch.Tensor:
        """Draw a token for each sample and note it, its log-probability and whether it ends. [B]"""
        import torch

        settings = self._settings
        if settings.temperature == 0:
            drawn = logits.argmax(dim=1)
        else:
            numbers = [sample.uniforms[len(sample.token_ids)] for sample in alive]
            weights = cut_weights(cooled(logits, settings.temperature), settings.top_k, settings.top_p)
            drawn = invert(weights, torch.tensor(numbers, dtype=torch.float64, device=logits.device))
        logprobs = torch.log_softmax(logits, dim=1).gather(1, drawn[:, None])[:, 0]
        for sample, token, logprob in zip(alive, drawn.tolist(), logprobs.tolist(), strict=True):
            sample.token_ids.append(token)
            sample.logprob += logprob
            sample.finish = self._finish(sample)
        return drawn

    def _finish(self, sample: _Sample) -> str:
        if sample.token_ids[-1] in self._settings.end_ids or self._has_end_text(sample.token_ids):
            return "stop"
        ended = len(sample.token_ids) == len(sample.uniforms) or not np.isfinite(sample.logprob)
        return "length" if ended else ""

    def _has_end_text(self, token_ids: Sequence[int]) -> bool:
        end = self._settings.end_text
        if end is None:
            return False
        return end in self._settings.tokenizer.decode(token_ids[-(len(end) + END_WINDOW) :])


def uniforms(seed: int, count: int) -> np.ndarray:
    """Return the first numbers of a sample's own stream, in [0, 1). [count] float64"""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def left_padded(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids (padding 0, on the left) and the attention mask. [B, T] int64 each"""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt.token_ids) :] = prompt.token_ids
        mask[row, longest - len(prompt.token_ids) :] = 1
    return ids, mask


def cooled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the logits over a temperature above 0; only their differences mean anything. [B, V]"""
    if temperature >= COLD:
        return logits / temperature
    return (logits - logits.max(dim=1, keepdim=True).values) / max(temperature, COLDEST)


def cut_weights(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return the probabilities of the tokens that may be drawn, 0 for the others, before renormalising.

    Args:
        logits: after the temperature. [B, V] float32
        top_k: keep so many of the largest, and what ties with the last of them; 0: all.
        top_p: of those, take out the smallest that together have at most 1 - top_p.

    Returns:
        [B, V] float32
    """
    import torch

    if 0 < top_k < logits.shape[1]:
        smallest = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    weights = torch.softmax(logits, dim=1)
    if top_p < 1:
        rising, order = weights.sort(dim=1, stable=True)
        cut = rising.cumsum(dim=1, dtype=torch.float64) <= 1 - top_p
        cut[:, -1] = False  # the likeliest always stays
        weights = weights.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), 0.0)
    return weights


def invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return per row the first token whose cumulative weight exceeds the number times the row's sum.

    Args:
        weights: not negative. [B, V] float32 numbers: in [0, 1). [B] float64
    """
    import torch

    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    wanted = (numbers[:, None] * cumulative[:, -1:]).contiguous()
    drawn = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return drawn.clamp(max=weights.shape[1] - 1)  # beyond the end only where the weights are not finite
