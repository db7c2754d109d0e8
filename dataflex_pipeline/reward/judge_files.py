"""The files of a judge or reward model: its identity, its tokenizer, and its longest text."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.source import (
    CODE,
    TOKENIZER_FILES,
    WEIGHTS,
    check_cached_weights,
    check_model_folder,
    check_weights,
    explained,
    local_folder,
)
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.store.fingerprint import digest, digest_while_unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNBOUNDED = 10**9
"""Tokenizers without a limit of their own say a number far above this."""


class JudgeFiles:
    """A model in a folder or on the hub.

    Args:
        name: folder or hub name. backend: whose setting it is, for messages.
        trust_remote_code: whether code that comes with it may run.

    Raises:
        UserError: it is written like a path and there is no model there.
    """

    def __init__(self, name: str, backend: str, trust_remote_code: bool) -> None:
        self.name = name
        self.key = f"{PLACE}.{backend}.hf_model_name_or_path"
        self.trust_remote_code = trust_remote_code
        self.folder = local_folder(name, self.key)
        if self.folder is not None:
            check_model_folder(self.folder, self.key)

    @property
    def arguments(self) -> dict[str, Any]:
        """What every ``from_pretrained`` call gets."""
        local = self.folder is not None or not hub_reachable()
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": local}

    @property
    def identity(self) -> str:
        """What tells it apart in a fingerprint: a digest over its files, or ``name@commit``."""
        if self.folder is None:
            return f"{self.name}@{self._commit}"
        code = CODE if self.trust_remote_code else ()
        patterns = ("config.json", "generation_config.json", *WEIGHTS, *TOKENIZER_FILES, *code)
        paths = sorted({path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()})
        return digest({path.name: digest_while_unchanged(path) for path in paths})

    def check(self) -> None:
        """Check that the model could be loaded, as far as its small files and the heads of its weights tell.

        Raises:
            UserError: a file is missing or cannot be used.
        """
        self.config, self.tokenizer  # noqa: B018 (loading them is the check)
        if self.folder is not None:
            check_weights(self.folder, self.key)
        elif not hub_reachable():
            check_cached_weights(self.name, self.key)

    @property
    def _commit(self) -> str:
        commit = getattr(self.config, "_commit_hash", None)
        if not commit:
            raise UserError(
                f"The hub model '{self.name}' has no commit that can be told.",
                "A fingerprint needs to know exactly which model judged.",
                f"Download it to a folder and set {self.key} to that folder.",
            )
        return str(commit)

    @functools.cached_property
    def config(self) -> Any:
        """Its configuration, of transformers."""
        from transformers import AutoConfig

        with explained(self.name, "configuration", self.key):
            return AutoConfig.from_pretrained(str(self.folder or self.name), **self.arguments)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer; short rows of a batch are filled up on the right."""
        from transformers import AutoTokenizer

        with explained(self.name, "tokenizer", self.key):
            tokenizer = AutoTokenizer.from_pretrained(str(self.folder or self.name), **self.arguments)
        tokenizer.padding_side = "right"
        return tokenizer

    @property
    def max_length(self) -> int | None:
        """The longest text that it takes, in tokens, or None where its files do not say."""
        inner = self.config.get_text_config()
        given = [getattr(inner, "max_position_embeddings", None), self.tokenizer.model_max_length]
        limits = [int(limit) for limit in given if limit is not None and 0 < limit < UNBOUNDED]
        return min(limits, default=None)

    def token_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return a conversation through the chat template, ending where the reply begins."""
        text = self.chat_text(messages, reply=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat_text(self, messages: list[dict[str, str]], *, reply: bool) -> str:
        """Return a conversation through the chat template; a system turn joins the user's where it has to.

        Args:
            messages: role and content. reply: whether the beginning of a reply follows.
        """
        from jinja2 import TemplateError

        try:
            return self._rendered(messages, reply)
        except TemplateError:
            if messages[0]["role"] != "system" or len(messages) == 1:
                raise
            # some templates refuse a system turn; what it says has to reach the model all the same
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return self._rendered([first, *messages[2:]], reply)

    def _rendered(self, messages: list[dict[str, str]], reply: bool) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        return str(text)
