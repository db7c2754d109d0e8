"""The journal of one part's rewards: a line per reply, so that a kill loses none that had arrived.

A line is appended and flushed as soon as the reply is there; where replies cost money it is also forced to
the disk before anything else is asked. Of several lines for an answer the last one's reward counts. A line
that cannot be read (cut off by a kill) is as if it had never been written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Self

from pydantic import TypeAdapter, ValidationError

from dataflex_pipeline.reward import Answer, Reward
from dataflex_pipeline.store.atomic import fsync_path

PREFIX = "_replies-"
JOURNALS = f"{PREFIX}*.jsonl"
"""The journals of a table; they go away once its parts are there."""
_ENTRY = TypeAdapter(tuple[tuple[str, str], Reward])


Place = tuple[str, str]
"""Key of an answer, and the digest of the texts that a reward was given for."""


def journal_path(folder: Path, first_row: int) -> Path:
    """Return the journal of the part that begins with a row of the split."""
    return folder / f"{PREFIX}{first_row:08d}.jsonl"


def journals(folder: Path) -> Iterator[Path]:
    """Yield the journals of a table."""
    return folder.glob(JOURNALS)


def place(answer: Answer) -> Place:
    """Return under what an answer's reward is kept: another text under the same key is another answer."""
    text = json.dumps([answer.prompt, answer.completion, answer.reference])
    return answer.key, hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Journal:
    """Rewards by answer, on disk; entering reads what is there and opens it for more.

    Args:
        path: of the journal; None for rewards that are sooner computed again than written down.
        durable: force every line to the disk; else it is only safe from the end of the process, not from
            that of the machine.

    Attributes:
        rewards: by place, with attempts and seconds of all replies.
        replies: how many replies were kept, by place.
    """

    def __init__(self, path: Path | None, durable: bool) -> None:
        self.path = path
        self.durable = durable
        self._stream: IO[bytes] | None = None
        self.rewards: dict[Place, Reward] = {}
        self.replies: Counter[Place] = Counter()

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        whole = self.path.read_bytes() if self.path.exists() else b""
        for line in whole.splitlines():
            self._read(line)
        self._stream = self.path.open("ab")
        if whole and not whole.endswith(b"\n"):
            self._stream.write(b"\n")  # so that the next line does not join a torn one
        fsync_path(self.path.parent)
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def _read(self, line: bytes) -> None:
        """Take a line over, unless it was cut off or is none of ours."""
        try:
            where, reward = _ENTRY.validate_json(line)
        except ValidationError:
            return
        self._add(where, reward)

    def _add(self, where: Place, reward: Reward) -> Reward:
        """Count one more reply; attempts and seconds of those before are added to it."""
        before = self.rewards.get(where)
        if before is not None:
            attempts, seconds = before.attempts + reward.attempts, before.seconds + reward.seconds
            reward = replace(reward, attempts=attempts, seconds=seconds)
        self.rewards[where] = reward
        self.replies[where] += 1
        return reward

    def known(self, answer: Answer) -> Reward | None:
        """Return the reward that was given for exactly these texts, or None."""
        return self.rewards.get(place(answer))

    def replied_once_without_score(self, answer: Answer) -> bool:
        """Whether there is one reply, and its words hold no score."""
        where = place(answer)
        reward = self.rewards[where]
        return reward.value is None and reward.raw is not None and self.replies[where] == 1

    def keep(self, answer: Answer, reward: Reward) -> None:
        """Write one reply down."""
        where = place(answer)
        if self._stream is not None:
            self._stream.write(json.dumps([where, asdict(reward)]).encode() + b"\n")
            self._stream.flush()
            if self.durable:
                os.fsync(self._stream.fileno())
        self._add(where, reward)
