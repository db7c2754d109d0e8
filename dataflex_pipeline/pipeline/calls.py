"""An open run whose settings a call may change: they hold from then on, unless the call fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from dataflex_pipeline.api import Progress
from dataflex_pipeline.config.draw_rules import AMOUNTS
from dataflex_pipeline.config.load import Loaded
from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.methods import check_methods
from dataflex_pipeline.models.one_base import one_base
from dataflex_pipeline.pipeline.keywords import as_overrides
from dataflex_pipeline.pipeline.locate import Options, load_for, locate
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome


class CalledRun(OpenRun):
    """What `Run` is built on; it is made by ``_open``.

    Attributes:
        outcomes: what the last call was asked for, done or up to date.
    """

    def _open(self, options: Options, progress: Progress, *, reads_only: bool = False) -> None:
        store, loaded = locate(options)
        if store.folder.exists() and not store.folder.is_dir():
            raise RunError(
                f"{store.folder} is a file.",
                "A run is a folder, new or begun.",
                "Name a folder that is one, or none yet.",
            )
        shared = loaded.config.features_dir
        if shared is not None and expanded(shared).is_file():
            raise RunError(
                f"features_dir is {shared}, which is a file.",
                "Features are tables in folders of their own below it.",
                "Name a folder, there already or not yet.",
            )
        super().__init__(loaded, store, options.overwrite, progress, reads_only=reads_only)
        self._options, self._called = options, False
        self.outcomes: list[Outcome] = []

    @contextlib.contextmanager
    def _call(self, settings: Mapping[str, Any], *, passing: bool = False) -> Iterator[None]:
        """Lay settings over those there are for a call; one that fails leaves the settings as they were.

        So does one whose settings are ``passing``. What an earlier call read is read again: a command, or
        another process, may have gone on meanwhile.
        """
        before = self._options, self.loaded
        named = dict(as_overrides(settings))
        if {"runs_dir", "output_dir"} & set(named):
            raise UserError(
                "runs_dir or output_dir was given to a run that is open.",
                "They say where a run is.",
                "Open another one: Run(FOLDER, ...).",
            )
        try:
            named |= self._amounts_replaced(named)
            if named:
                there = {text.partition("=")[0].strip(): text for text in self._options.overrides}
                self._options = replace(self._options, overrides=tuple((there | named).values()))
            if named or self._called:
                self.loaded = load_for(self.store, self._options)
                check_methods(self.loaded.config, self.loaded.config_dir)
                self.forget()
            self._called = True
            with one_base():
                yield
            if passing:
                self._restore(before)
        except BaseException:
            self._restore(before)
            raise

    def _restore(self, before: tuple[Options, Loaded]) -> None:
        self._options, self.loaded = before
        self.forget()

    def _amounts_replaced(self, named: Mapping[str, str]) -> dict[str, str]:
        """Return what takes back the amounts that a newly given one replaces; only one can hold."""
        if all(text.endswith("=null") for name, text in named.items() if name in AMOUNTS):
            return {}
        set_before = [each for each in AMOUNTS if getattr(self.loaded.config, each) is not None]
        return {each: f"{each}=null" for each in set_before if each not in named}
