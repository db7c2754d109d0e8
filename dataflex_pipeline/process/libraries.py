"""Settings of the libraries underneath: their warnings and their waiting, made before they are imported."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_NOISE = {"DeepSpeed": ("Setting accelerator to CPU",)}
"""Logger -> beginnings of messages that are the normal case here and read like a fault."""
_ENVIRONMENT = {
    # The tokenizer's threads and the forks of a data loader do not go together, and it warns at length.
    "TOKENIZERS_PARALLELISM": "false",
    # Waiting OpenMP threads sleep instead of spinning: on a busy machine training is 3 times faster.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Bars of downloads would be drawn into ours.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


class _KnownNoise(logging.Filter):
    """Drops the messages that begin with one of the given texts; everything else passes."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        return record.levelno >= logging.ERROR or not record.getMessage().startswith(self._beginnings)


def quieten() -> None:
    """Set up the libraries; called before any of them is imported, more than once at no harm.

    Their warnings stay, with the exceptions above; notices to programmers (deprecations) go. What is set in
    the environment (PYTHONWARNINGS, -W and the variables above) counts more.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", kind)
    for name, beginnings in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _KnownNoise) for each in logger.filters):
            logger.addFilter(_KnownNoise(beginnings))
