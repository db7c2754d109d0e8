"""How good the demo model is: exact match of greedy answers, and mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_pipeline.demo.corpus import Row
from dataflex_pipeline.demo.pretrain import padded

BATCH_ROWS = 64


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
    """Answer each prompt as one user turn, always taking the likeliest token.

    Prompts are padded on the left, which is where a decoder's padding belongs; the answers come without
    special tokens.
    """
    import torch

    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_ROWS):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts[start : start + BATCH_ROWS]
        ]
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = made[:, batch["input_ids"].shape[1] :]  # [B, new tokens]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Give the share of rows whose greedy answer is the right one, character for character."""
    answers = greedy_answers(model, tokenizer, [row.prompt for row in rows])
    return sum(answer == row.output for answer, row in zip(answers, rows, strict=True)) / len(rows)


def mean_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> float:
    """Give the mean over rows of each row's mean loss, nats per answer token.

    Args:
        rows: (input ids, labels) of each row.
        pad_id: the padding token.
    """
    import torch

    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids, mask, labels = padded([row], pad_id)
            total += model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    return total / len(rows)
