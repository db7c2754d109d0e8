"""Completions drawn in batches, by either generator, beside a loop that draws one after the other.

    python benchmarks/generation.py --prompts 64 --samples 4 --json generation.json

Without ``--model`` a random-initialised Llama is made (--hidden, --layers, --vocabulary), whose completions
hardly ever end by themselves, so that all draw the same number of tokens. Measured, per generator:

- ``one by one``: transformers' own ``generate`` with a key-value cache, a prompt at a time, on --single of
  the completions;
- ``transformers``: generate/transformers.py, --batch completions at a time;
- ``vllm``: generate/vllm.py, if vLLM is installed. Starting the engine is counted apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up import parser_of, random_llama, settings_of
from surroundings import publish, surroundings

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.generate import Generator, Prompt
from dataflex_pipeline.generate.generators import make_generator
from dataflex_pipeline.generate.settings import (
    GenerationSettings,
    context_of,
    endings,
    model_settings,
)
from dataflex_pipeline.vllm.engine import vllm_installed


def saved_model(folder: Path, settings: dict[str, Any]) -> str:
    """Save a random-initialised Llama with a word-level tokenizer; return its folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    random_llama(settings).save_pretrained(folder)
    words = {f"w{number}": number for number in range(settings["vocab_size"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w2", pad_token="w0"
    ).save_pretrained(folder)
    return str(folder)


def random_prompts(count: int, samples: int, longest: int, vocabulary: int) -> list[Prompt]:
    """Return prompts of 8 to ``longest`` random tokens, each ``samples`` times with seeds of their own."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, vocabulary, rng.integers(8, longest + 1)).tolist() for _ in range(count)]
    return [Prompt(ids, row * samples + sample) for row, ids in enumerate(texts) for sample in range(samples)]


def one_by_one(config: Config, settings: GenerationSettings, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Draw with transformers' generate, a prompt at a time."""
    from dataflex_pipeline.models.base import load_for_scoring, resolve_device

    model = load_for_scoring(config, None, resolve_device(config.device))
    tokens, began = 0, time.perf_counter()
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([list(prompt.token_ids)], device=model.device)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=settings.temperature,
                top_k=0,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=list(settings.end_ids),
                pad_token_id=0,
            )
            tokens += made.shape[1] - ids.shape[1]
    return rate(tokens, time.perf_counter() - began)


def rate(tokens: int, seconds: float) -> dict[str, float]:
    """Return the figures of one way of drawing."""
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def batched(generator: Generator, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Draw everything with a generator, after a short first call; loading is counted apart."""
    began = time.perf_counter()
    with generator:
        generator.generate(prompts[:1])
        ready = time.perf_counter()
        drawn = generator.generate(prompts)
        figures = rate(sum(len(each.token_ids) for each in drawn), time.perf_counter() - ready)
    return figures | {"seconds_until_ready": ready - began}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every way of drawing on one model and one set of prompts."""
    settings = settings_of(args)
    model = args.model if settings is None else saved_model(folder, settings)
    config = Config(model_name_or_path=model, device=args.device, bf16=args.dtype == "bfloat16")
    known = model_settings(config)
    tokenizer, end_ids, end_text = endings(config, known, print)
    drawing = GenerationSettings(
        max_new_tokens=args.new_tokens,
        temperature=1.0,
        end_ids=end_ids,
        end_text=end_text,
        context=context_of(known),
        batch=args.batch,
        tokenizer=tokenizer,
    )
    prompts = random_prompts(args.prompts, args.samples, args.longest, int(known.vocab_size))
    results = {"one by one": one_by_one(config, drawing, prompts[: args.single])}
    names = ["transformers", "vllm"] if vllm_installed() else ["transformers"]
    for name in names:
        generator = make_generator(name, config, None, drawing, args.longest, print)  # type: ignore[arg-type]
        results[name] = batched(generator, prompts)
    slow = results["one by one"]["tokens_per_second"]
    return {
        "completions": len(prompts),
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "results": results,
        "ratios": {f"{name} / one by one": results[name]["tokens_per_second"] / slow for name in names},
        "threads": torch.get_num_threads(),
        **surroundings(),
    }


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4, help="completions per prompt")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64, help="completions at a time")
    parser.add_argument("--single", type=int, default=8, help="completions that are drawn one by one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(measure(args, Path(folder)), args.json)


if __name__ == "__main__":
    main()
