"""Data sets from the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.readers import plain_rows
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.hub import hub_reachable

if TYPE_CHECKING:
    import datasets

_BATCH_ROWS = 1024


@dataclass(frozen=True)
class HubName:
    """A data set on the hub: repository, configuration, split, folder inside it, and version."""

    repository: str
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    revision: str | None = None


def read_hub(hub: HubName, given: str) -> Iterator[Row]:
    """Yield the rows of a hub data set from its memory-mapped cache, downloading it when missing.

    No code of the data set's repository is run.

    Args:
        hub: what to load. given: what the user wrote, for messages.

    Raises:
        DataError: the hub or the data set cannot be reached, or has no such subset or split.
    """
    for batch in _load(hub, given).with_format("arrow").iter(batch_size=_BATCH_ROWS):
        yield from plain_rows(f"data set '{given}'", batch)


def count_hub(hub: HubName, given: str) -> int:
    """Return how many rows a hub data set has.

    Raises:
        DataError: as for `read_hub`.
    """
    return len(_load(hub, given))


def hub_fingerprint(hub: HubName, given: str) -> str:
    """Return what ``datasets`` tells versions of a hub data set apart by: its commit, subset and split.

    Raises:
        DataError: as for `read_hub`.
    """
    return str(_load(hub, given)._fingerprint)


def _load(hub: HubName, given: str) -> datasets.Dataset:
    import datasets

    if not hub_reachable() and not _is_cached(hub.repository, Path(datasets.config.HF_DATASETS_CACHE)):
        raise _not_loaded(hub, given, "The hub's name cannot be resolved: there is no network here.")
    try:
        version = {} if hub.revision is None else {"revision": hub.revision}
        return datasets.load_dataset(
            hub.repository, name=hub.subset, data_dir=hub.folder, split=hub.split, **version
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise _not_loaded(hub, given, f"{type(error).__name__}: {first}") from error


def _not_loaded(hub: HubName, given: str, why: str) -> DataError:
    return DataError(
        f"dataset '{given}' is neither a local file or folder nor an entry of dataset_info.json, and "
        f"loading {hub.repository} (split {hub.split}) from the hub failed.",
        why,
        "Check the name, the connection (or HF_TOKEN for a gated one), or give a local file.",
    )


def _is_cached(repository: str, cache: Path) -> bool:
    return (cache / repository.replace("/", "___")).exists()
