"""The generations feature: ``mc_samples`` answers of the current policy to each of the target's prompts.

The prompt of a row is the head of its prepared token ids: all that stands before the labels of its last
response. That is the conversation up to the last assistant turn, written by the run's chat template with its
generation prompt, token for token as training sees it (data/chat/labelled.py tokenises prompts and responses
apart).
A prompt longer than ``max_prompt_length`` loses its beginning.

Line = row x mc_samples + sample. The seed of a sample is derived from the parameter ``seed``, the row's
content hash and number, and the sample's number, so that no two samples share one, and none depends on what
else is drawn or when. ``logprob`` is taken under the model itself, at temperature 1 and with nothing cut off,
whatever the completion was drawn at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.params import DrawnParams
from dataflex_pipeline.generate import Completion, Generator, Prompt
from dataflex_pipeline.generate.generators import check_generator, choose_generator, make_generator
from dataflex_pipeline.generate.settings import (
    GenerationSettings,
    context_of,
    endings,
    model_settings,
)
from dataflex_pipeline.models.source import number_ingredients
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import IGNORED, REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.seeds import derive_seed

DRAWN_COST = 4
"""Tokens of a prompt that take about as long as one drawn token, for which all weights are read anew."""
CUT_OFF = "cutoff_len takes the last response away, so there is no telling where its prompt ends"

SCHEMA = pa.schema(
    [
        ROW,
        ROW_ID,
        column(
            "sample", pa.int32(), "number of the completion among those of its row, from 0", nullable=False
        ),
        column("prompt_tokens", pa.int32(), "tokens of the prompt that the model was given"),
        column("prompt_cut", pa.int32(), "tokens taken off the prompt's beginning (max_prompt_length)"),
        column("prompt", pa.list_(pa.int32()), "token ids of the prompt"),
        column("completion", pa.string(), "text of the completion, without its end token"),
        column("token_ids", pa.list_(pa.int32()), "token ids of the completion, with its end token if drawn"),
        column("n_tokens", pa.int32(), "tokens of the completion, its end included"),
        column("finish", pa.string(), "stop: it ended by itself; length: the limit cut it"),
        column(
            "logprob",
            pa.float64(),
            "log-probability of the completion at temperature 1 (nats, summed)",
        ),
        column("seed", pa.int64(), "of this completion's random numbers"),
        VALID,
        REASON,
    ]
)


@dataclass(frozen=True)
class RowPrompt:
    """The prompt of a target row, or why it has none.

    Attributes:
        token_ids: what the model is given. cut: tokens taken off its beginning. reason: why there is none.
    """

    token_ids: tuple[int, ...] = ()
    cut: int = 0
    reason: str | None = None


class Generations(api.Feature):
    """Completions of the target's prompts, drawn from the policy at one checkpoint."""

    schema = SCHEMA
    input_columns = ("row", "row_id", "messages", "input_ids", "labels", "valid", "reason")

    Params = DrawnParams
    params: DrawnParams

    def __init__(self, params: Any, config: Any) -> None:
        self._asked = params.generator
        self._generator = choose_generator(params.generator, config.device)
        super().__init__(params.model_copy(update={"generator": self._generator}), config)
        # an engine over several GPUs: rank 0 of a launch drives it, and the other processes wait
        self.takes_the_machine = self._generator == "vllm" and params.generation_tensor_parallel_size > 1

    @property
    def lines_per_row(self) -> int:
        """Every row has a line per sample, drawn or not."""
        return int(self.params.mc_samples)

    def ingredients(self) -> dict[str, Any]:
        """Return the precision, and the attention kernel where it is ours to choose."""
        found = number_ingredients(self.config)
        return found if self.params.generator == "transformers" else {**found, "attn_implementation": None}

    def row_flops(self, tokens: float) -> float:
        """Return those of its prompt and of the longest answers, whose tokens are drawn one by one."""
        drawn = DRAWN_COST * self.params.max_new_tokens
        return row_flops(self.config, tokens + drawn, passes=self.params.mc_samples)

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check that the generator is installed."""
        check_generator(self._generator, self.config)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the policy once; yield the function from rows to their completions."""
        say = progress.say
        settings = self._settings(say)
        counts: Counter[str] = Counter()
        if self._asked == "auto":
            say(f"generator: auto is {self._generator} (vllm on a GPU, if installed; else transformers)")
        longest = self.params.max_prompt_length
        with make_generator(
            self._generator, self.config, given.checkpoint, settings, longest, say, given.folder
        ) as generator:

            def compute(rows: pa.Table) -> pa.Table:
                return self._compute(rows, generator, settings, counts)

            yield compute
        self._tell(counts, settings, say)

    def _settings(self, say: Callable[[str], None]) -> GenerationSettings:
        params = self.params
        model = model_settings(self.config)
        tokenizer, end_ids, end_text = endings(self.config, model, say)
        return GenerationSettings(
            max_new_tokens=params.max_new_tokens,
            temperature=params.generation_temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            end_ids=end_ids,
            end_text=end_text,
            context=context_of(model),
            batch=params.generation_batch_size,
            gpu_memory_utilization=params.generation_gpu_memory_utilization,
            tensor_parallel_size=params.generation_tensor_parallel_size,
            tokenizer=tokenizer,
        )

    def _compute(
        self, rows: pa.Table, generator: Generator, settings: GenerationSettings, counts: Counter[str]
    ) -> pa.Table:
        prompts = self._prompts(rows, settings)
        numbers = rows.column("row").to_pylist()
        ids = rows.column("row_id").to_pylist()
        seeds = [
            sample_seed(self.params.seed, row_id, row, sample)
            for row, row_id in zip(numbers, ids, strict=True)
            for sample in range(self.params.mc_samples)
        ]
        lines = [prompt for prompt in prompts for _ in range(self.params.mc_samples)]
        asked = [place for place, prompt in enumerate(lines) if prompt.reason is None]
        drawn = generator.generate([Prompt(lines[place].token_ids, seeds[place]) for place in asked])
        completions = dict(zip(asked, drawn, strict=True))
        counts.update(
            prompts=sum(prompt.reason is None for prompt in prompts),
            cut=sum(prompt.cut > 0 for prompt in prompts),
            unusable=sum(prompt.reason is not None for prompt in prompts),
            completions=len(drawn),
            unfinished=sum(each.finish == "length" for each in drawn),
        )
        return self._table(rows, lines, seeds, completions)

    def _prompts(self, rows: pa.Table, settings: GenerationSettings) -> list[RowPrompt]:
        columns = [rows.column(name).to_pylist() for name in ("input_ids", "labels", "messages", "valid")]
        made = []
        for place, (ids, labels, messages, valid) in enumerate(zip(*columns, strict=True)):
            if not valid:
                made.append(RowPrompt(reason=rows.column("reason")[place].as_py()))
                continue
            turns = 1 if self.config.mask_history else sum(turn["role"] == "assistant" for turn in messages)
            at_cutoff = len(ids) >= self.config.cutoff_len
            prompt = row_prompt(ids, labels, turns if at_cutoff else None, self.params.max_prompt_length)
            if prompt.reason is None and settings.room(len(prompt.token_ids)) < 1:
                prompt = RowPrompt(
                    reason=f"the prompt fills the model's context of {settings.context} tokens"
                )
            made.append(prompt)
        return made

    def _table(
        self,
        rows: pa.Table,
        lines: Sequence[RowPrompt],
        seeds: Sequence[int],
        completions: dict[int, Completion],
    ) -> pa.Table:
        samples = self.params.mc_samples
        places = np.repeat(np.arange(rows.num_rows), samples)
        drawn = [completions.get(place) for place in range(len(lines))]
        asked = [None if prompt.reason is not None else prompt for prompt in lines]
        reasons = [
            prompt.reason
            if one is None
            else None
            if np.isfinite(one.logprob)
            else "its log-probability is not finite"
            for prompt, one in zip(lines, drawn, strict=True)
        ]
        columns = {
            "row": rows.column("row").take(places),
            "row_id": rows.column("row_id").take(places),
            "sample": np.tile(np.arange(samples, dtype=np.int32), rows.num_rows),
            "prompt_tokens": [each and len(each.token_ids) for each in asked],
            "prompt_cut": [each and each.cut for each in asked],
            "prompt": [each and list(each.token_ids) for each in asked],
            "completion": [each and each.text for each in drawn],
            "token_ids": [each and list(each.token_ids) for each in drawn],
            "n_tokens": [each and len(each.token_ids) for each in drawn],
            "finish": [each and each.finish for each in drawn],
            "logprob": [each.logprob if each and np.isfinite(each.logprob) else None for each in drawn],
            "seed": [each and seed for each, seed in zip(asked, seeds, strict=True)],
            "valid": [reason is None for reason in reasons],
            "reason": reasons,
        }
        return pa.table(columns, schema=self.schema)

    def _tell(self, counts: Counter[str], settings: GenerationSettings, say: Callable[[str], None]) -> None:
        """Say how many prompts and completions were cut."""
        params = self.params
        line = f"generations: {counts['completions']} completions of {counts['prompts']} prompts"
        if counts["unusable"]:
            line += f"; {counts['unusable']} rows without"
        if counts["cut"]:
            line += f"; {counts['cut']} prompts lost their beginning to max_prompt_length"
            line += f" {params.max_prompt_length}"
        if counts["unfinished"]:
            limit = f"max_new_tokens {params.max_new_tokens}"
            if settings.context is not None and params.max_new_tokens >= settings.context:
                limit += f" and the model's context of {settings.context}"
            line += f"; {counts['unfinished']} were cut by {limit}"
        say(line)


def sample_seed(seed: int, row_id: str, row: int, sample: int) -> int:
    """Return the seed of one completion, in [0, 2**63).

    Args:
        seed: the parameter. row_id: content hash of the row. row: its number, which tells rows of equal
            content apart. sample: number among the row's completions.
    """
    return derive_seed(seed, "completion", row_id, row, sample) >> 1


def row_prompt(
    input_ids: Sequence[int], labels: Sequence[int], responses: int | None, max_length: int
) -> RowPrompt:
    """Return what stands before the last labelled response of a prepared row.

    Args:
        input_ids, labels: the row's. [T]
        responses: how many labelled responses the row must have for its last one to be there; None: it is,
            because nothing was cut off.
        max_length: tokens of a prompt at most.
    """
    labelled = np.asarray(labels) != IGNORED
    starts = np.flatnonzero(labelled & ~np.concatenate([[False], labelled[:-1]]))
    if responses is not None and len(starts) < responses:
        return RowPrompt(reason=CUT_OFF)
    ids = tuple(input_ids[: starts[-1]])
    if not ids:
        return RowPrompt(reason="nothing stands before the last response")
    return RowPrompt(ids[-max_length:], max(0, len(ids) - max_length))
