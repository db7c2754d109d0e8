"""The source of a model: a local folder or a hub name, and its identity in a fingerprint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from dataflex_pipeline.errors import ConfigError, DataflexError, UserError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.store.fingerprint import digest, file_digest

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

_KERNEL = re.compile(
    r"attn_implementation|attention implementation|flash.?attention|flash_attn", re.IGNORECASE
)
"""What errors about an attention kernel that a model lacks, or that is not installed, say."""
SOFT_CAPPED = ("gemma2", "t5gemma", "vaultgemma")
"""Model types whose attention scores are soft-capped unless config.json says otherwise."""
WITHOUT_SOFT_CAP = ("sdpa",)
"""Attention kernels that pass over a model's soft-capping of attention scores without a word."""
MODEL_KEY = "model_name_or_path"
"""The setting that messages name where no other is said."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""What the weights of a hub model are called, whole or in several files."""
CODE = ("*.py",)
"""What runs with ``trust_remote_code: true``, and only then counts."""
LAYERS = 1_000
"""Layers that a model may have: more take minutes to make before their weights turn out not to be there."""
SIZES = {"num_hidden_layers": LAYERS} | dict.fromkeys(
    (
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
    ),
    2**31 - 1,
)
"""Keys of config.json that are counts wherever they occur, and the largest that is taken."""
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
    "*.model",
    "*.tiktoken",
)


def quiet(line: str) -> None:
    """Say nothing: the default listener of the loading functions."""


def local_folder(name: str, key: str = MODEL_KEY) -> Path | None:
    """Return the folder that a model name stands for, or None for a hub name.

    An existing folder is a folder. What is written like a path (absolute, starting with ``.`` or ``~``,
    or more than one slash) is never looked up on the network.

    Args:
        name: what was set. key: the setting that it was given by, for messages.

    Raises:
        UserError: it is written like a path and no such folder exists, or it is a file.
    """
    path = expanded(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"The model '{name}' is a file.",
            "A model is a folder with config.json, weights in safetensors and the tokenizer's files.",
            f"Set {key} to that folder, or to a hub name such as Qwen/Qwen2.5-0.5B.",
        )
    if not name.strip() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(
            f"The model folder '{name}' does not exist.",
            "It is written like a path, so it is not looked up on the hub.",
            f"Correct {key}, or give a hub name such as Qwen/Qwen2.5-0.5B.",
        )
    return None


def check_model_folder(folder: Path, key: str = MODEL_KEY) -> None:
    """Check that a local folder holds a model whose weights can be read without unpickling anything.

    Raises:
        UserError: config.json is missing, there are no weights, or only pickled ones.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json.",
            "It is not the folder of a transformers model.",
            f"Set {key} to a folder that save_pretrained() wrote, or to a hub name.",
        )
    model_configuration(folder, key)
    if any(path.is_file() for path in folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise UserError(
            f"{folder} has its weights only as pickle ({', '.join(pickled[:3])}).",
            "Reading a pickle can run any code that is in it, so only safetensors are read.",
            "Convert it once: load the model in a place that trusts it and call save_pretrained(), "
            "which writes model.safetensors.",
        )
    raise UserError(
        f"{folder} has a config.json but no *.safetensors file.",
        "Without weights there is no model to score or train.",
        f"Copy the weights into the folder, or set {key} to another one.",
    )


def model_configuration(folder: Path, key: str = MODEL_KEY) -> dict[str, Any]:
    """Return the config.json of a local model, whose sizes are sizes.

    Raises:
        UserError: it is no object, or a size is no whole number that a model can have.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _unusable_configuration(path, f"it is no JSON ({error})", key) from error
    if not isinstance(content, dict):
        raise _unusable_configuration(path, "it is no object", key)
    text = content.get("text_config") or {}
    if not isinstance(text, dict):
        raise _unusable_configuration(path, "its text_config is no object", key)
    for name, value in (*content.items(), *text.items()):
        most = SIZES.get(name)
        if most and value is not None and (type(value) is not int or not 0 < value <= most):
            raise _unusable_configuration(path, f"its {name} is {json.dumps(value)[:40]}", key)
    if content.get("return_dict") is False:
        raise _unusable_configuration(path, "its return_dict is false, so what it returns has no names", key)
    return content


def _unusable_configuration(path: Path, why: str, key: str) -> UserError:
    return UserError(
        f"{path} cannot be used: {why}.",
        f"It says how large the model is: {', '.join(list(SIZES)[:3])} and others are whole numbers "
        f"above 0, the layers {LAYERS:,} at most.",
        f"Copy the model's own config.json again, or set {key} to another model.",
    )


def check_weights(folder: Path, key: str = MODEL_KEY) -> None:
    """Check by the heads of a folder's weight files that they are whole, without reading the weights.

    Raises:
        UserError: a file is missing that the index names, or one is cut off or no safetensors file.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unusable_weights(index, f"it is no index of weights ({error})", key) from error
        for name in sorted(named):
            if not (folder / name).is_file():
                raise _unusable_weights(index, f"it names {name}, which is not there", key)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise _unusable_weights(path, str(error), key) from error


def check_cached_weights(name: str, key: str = MODEL_KEY, revision: str | None = None) -> None:
    """Check that a hub model, which cannot be fetched now, was downloaded with its weights.

    Raises:
        UserError: there are no weights of it in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in WEIGHT_FILES:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return check_weights(Path(found).parent, key)
    raise UserError(
        f"The weights of the hub model '{name}' are not in the cache, and the hub cannot be reached.",
        "Other files of it were downloaded before, and without weights there is no model.",
        f"Check the network, or set {key} to a folder that holds the model.",
    )


@contextmanager
def unreadable_weights(path: Path) -> Iterator[None]:
    """Turn what reading the head of a damaged file of weights, or an index, raises into one error."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unusable_weights(path, f"{type(error).__name__}: {error}", MODEL_KEY) from error


def _unusable_weights(path: Path, why: str, key: str) -> UserError:
    return UserError(
        f"The weights in {path} cannot be read: {why}.",
        "The model could not be loaded when it is needed.",
        f"Download or copy the model again, or set {key} to another one.",
    )


@contextmanager
def explained(name: str, what: str, key: str = MODEL_KEY) -> Iterator[None]:
    """Turn what transformers raises on an unusable model into one error that says what to do."""
    try:
        yield
    except DataflexError:
        raise
    except Exception as error:  # a model's files may hold anything, and break the libraries in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = lines[0] if lines else type(error).__name__
        if _KERNEL.search(str(error)):
            raise ConfigError(
                f"The model '{name}' cannot be loaded with the attention kernel asked for: {found}",
                "Not every model has every kernel, and some kernels are packages of their own.",
                "Set attn_implementation to eager, which every model has, or leave it out.",
            ) from error
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"The model '{name}' comes with Python code of its own and trust_remote_code is false.",
                f"That code would run on this machine while its {what} is loaded.",
                "Set trust_remote_code: true only if you trust where the model comes from.",
            ) from error
        raise UserError(
            f"The {what} of the model '{name}' could not be loaded: {found}",
            "It is neither the folder of a usable model nor a hub model in the cache or within reach.",
            f"Check {key} and its revision, the network, or download the model to a folder.",
        ) from error


def load_arguments(config: Config) -> dict[str, Any]:
    """Return the keyword arguments that every ``from_pretrained`` call gets."""
    local = local_folder(config.model_name_or_path) is not None
    return {
        "trust_remote_code": config.trust_remote_code,
        "local_files_only": local or not hub_reachable(),
        **({} if local or config.model_revision is None else {"revision": config.model_revision}),
    }


def attention_kernel(config: Config) -> str | None:
    """Return the attention kernel that the model is loaded with; None for transformers' own choice.

    A model that soft-caps its attention scores (Gemma 2) gets eager where none is set: transformers would
    take sdpa, which leaves the capping out.
    """
    if config.attn_implementation is None and soft_caps_attention(config):
        return "eager"
    return config.attn_implementation


def number_ingredients(config: Config) -> dict[str, Any]:
    """Return what moves the numbers of a model: precision, attention kernel, quantization where there is one.

    Under bf16 an adapter is scored in bfloat16, as training computes it. What is not set is left out, so that
    it moves no fingerprint that was made before there was a key for it.
    """
    adapter = {"adapter": "bfloat16"} if config.bf16 is True else {}
    quantized = {} if config.quantization_bit is None else {"quantization_bit": config.quantization_bit}
    more = adapter | quantized | ({"tf32": True} if config.tf32 else {})
    return {"bf16": config.bf16, **more, "attn_implementation": attention_kernel(config)}


def attention_notice(config: Config) -> str | None:
    """Return what has to be said about the attention kernel; None for nothing."""
    if config.attn_implementation not in (None, *WITHOUT_SOFT_CAP) or not soft_caps_attention(config):
        return None
    if config.attn_implementation is None:
        return (
            "The model soft-caps its attention scores, which sdpa leaves out: it is run with eager attention."
        )
    return (
        f"attn_implementation: {config.attn_implementation} leaves out the soft-capping of this model's "
        "attention scores, so every number is that of a slightly different model; eager computes it."
    )


def soft_caps_attention(config: Config) -> bool:
    """Whether the model bounds its attention scores by ``attn_logit_softcapping``."""
    folder = local_folder(config.model_name_or_path)
    if folder is None:
        from transformers import AutoConfig

        with explained(config.model_name_or_path, "configuration"):
            found = AutoConfig.from_pretrained(config.model_name_or_path, **load_arguments(config))
        return getattr(found.get_text_config(), "attn_logit_softcapping", None) is not None
    check_model_folder(folder)
    content = model_configuration(folder)
    text = content.get("text_config") or content
    # A value that is the family's default is not in the file.
    default = str(text.get("model_type", "")).startswith(SOFT_CAPPED) or None
    return text.get("attn_logit_softcapping", default) is not None


def _folder_digest(folder: Path, patterns: tuple[str, ...], digest_of: Callable[[Path], str]) -> str:
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return digest({path.name: digest_of(path) for path in paths})


def _hub_identity(config: Config) -> str:
    from transformers import AutoConfig

    name = config.model_name_or_path
    with explained(name, "configuration"):
        found = AutoConfig.from_pretrained(name, **load_arguments(config))
    commit = getattr(found, "_commit_hash", None)
    if not commit:
        raise UserError(
            f"The hub model '{name}' has no commit that can be told.",
            "A fingerprint needs to know exactly which weights were used.",
            "Download the model to a folder and set model_name_or_path to that folder.",
        )
    return f"{name}@{commit}"


def model_digest(config: Config, digest_of: Callable[[Path], str] = file_digest) -> str:
    """Return what identifies the base model in a fingerprint.

    Args:
        config: names the model.
        digest_of: gives the digest of a file, for callers that remember those of unchanged files.

    Returns:
        For a folder the digest over config.json, every weight file and, with ``trust_remote_code``, its
        Python files (the folder's own name is no part of it, so a moved model stays the same one); for a
        hub name ``name@commit``.

    Raises:
        UserError: the folder is no model, or the hub name cannot be resolved.
    """
    folder = local_folder(config.model_name_or_path)
    if folder is None:
        return _hub_identity(config)
    check_model_folder(folder)
    return _folder_digest(folder, ("config.json", *WEIGHTS, *_code(config)), digest_of)


def tokenizer_digest(config: Config, digest_of: Callable[[Path], str] = file_digest) -> str:
    """Return what identifies the tokenizer in a fingerprint: a digest over its files, or ``name@commit``.

    Args:
        config: names the model that it belongs to.
        digest_of: as for `model_digest`.
    """
    folder = local_folder(config.model_name_or_path)
    if folder is None:
        return _hub_identity(config)
    return _folder_digest(folder, (*TOKENIZER_FILES, *_code(config)), digest_of)


def _code(config: Config) -> tuple[str, ...]:
    return CODE if config.trust_remote_code else ()
