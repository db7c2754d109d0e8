"""Data sets from the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.errors import DataError

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class HubName:
    """A data set on the hub: repository, configuration, split and folder inside it."""

    repository: str
    subset: str | None = None
    split: str = "train"
    folder: str | None = None


def read_hub(hub: HubName, given: str) -> Iterator[Row]:
    """Yield the rows of a hub data set from its memory-mapped cache, downloading it when missing.

    No code of the data set's repository is run.

    Args:
        hub: what to load. given: what the user wrote, for messages.

    Raises:
        DataError: the hub or the data set cannot be reached, or has no such subset or split.
    """
    import datasets

    try:
        table = datasets.load_dataset(hub.repository, name=hub.subset, data_dir=hub.folder, split=hub.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset '{given}' is neither a local file or folder nor an entry of dataset_info.json, and "
            f"loading {hub.repository} (split {hub.split}) from the hub failed.",
            f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}",
            "Check the name, the connection (or HF_TOKEN for a gated one), or give a local file.",
        ) from error
    for batch in table.with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from batch.to_pylist()
