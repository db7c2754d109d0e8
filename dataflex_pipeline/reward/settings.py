"""The settings of the four rewarders, as they stand below ``reward_backend_params``.

Only the chosen backend's settings count in a fingerprint, and of those only what can change a reward:
fields marked *runtime* (timeouts, concurrency, budgets, memory) are left out of it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dataflex_pipeline.config.redaction import is_secret, is_secret_name
from dataflex_pipeline.errors import ConfigError, did_you_mean

PLACE = "nice.reward_backend_params"
"""Where the settings stand, as a user of `nice`, which passes them on, would type it."""
QUERY = ("api-version", "api_version", "version", "deployment", "deployment-id", "region")
"""Query parameters that an address may have: keys go by too many names to list those instead."""
_QUERY_VALUE = re.compile(r"[\w.-]*", re.ASCII)


def runtime(default: Any, description: str, **limits: Any) -> Any:
    """Return a field that changes how a reward is computed and not which one: no part of fingerprints."""
    return Field(default, description=f"{description} (runtime)", exclude=True, **limits)


class Settings(BaseModel):
    """What all settings share: strict, and fixed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class JudgeSettings(Settings):
    """How a language model is asked for a score; null takes the prompts of `judge_prompts`."""

    max_score: float = Field(1.0, gt=0, description="best score; the judge is told, the reward is score / it")
    show_reference: bool = Field(
        True, description="show the judge the target row's own answer, where it has one"
    )
    system_prompt: str | None = Field(None, description="what the judge is told first")
    prompt: str | None = Field(None, description="text with {prompt} and {completion}, without a reference")
    prompt_with_reference: str | None = Field(
        None, description="text with {prompt}, {completion} and {reference}"
    )

    @model_validator(mode="after")
    def _check_templates(self) -> JudgeSettings:
        for name, wanted in (
            ("prompt", ("{completion}",)),
            ("prompt_with_reference", ("{completion}", "{reference}")),
        ):
            text = getattr(self, name)
            for mark in wanted:
                if text is not None and mark not in text:
                    raise ValueError(f"{name} has no {mark}: the judge would not see what it is to grade")
        return self


class LocalVllmSettings(JudgeSettings):
    """A judge that vLLM runs on this machine."""

    hf_model_name_or_path: str = Field("meta-llama/Llama-3.1-8B", description="folder or hub name")
    vllm_tensor_parallel_size: int = runtime(1, "accelerators that share the judge", ge=1)
    vllm_temperature: float = Field(0.0, ge=0, description="0: the most likely reply")
    vllm_top_p: float = Field(0.9, gt=0, le=1, description="share of probability that is drawn from")
    vllm_max_tokens: int = Field(512, ge=1, description="longest reply in tokens")
    vllm_top_k: int = Field(40, ge=-1, description="tokens that are drawn from; 0 or -1: all")
    vllm_seed: int = Field(42, ge=0, description="of the replies' own streams")
    vllm_max_model_len: int | None = Field(None, ge=1, description="longest prompt and reply; null: model's")
    vllm_gpu_memory_utilization: float = runtime(0.9, "share of the accelerator's memory", gt=0, le=1)
    structured_output: bool = Field(
        True, description="allow the judge no other reply than 'Score: <number>'; false: it may reason first"
    )
    vllm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format; auto: that of the judge's files, and float32 on a CPU"
    )
    trust_remote_code: bool = Field(False, description="let the judge bring Python code of its own")


class ApiSettings(JudgeSettings):
    """A judge behind an OpenAI-compatible chat endpoint."""

    api_url: str = Field(
        "https://api.openai.com/v1/chat/completions", description="full address of the endpoint"
    )
    api_key: str | None = runtime("DF_API_KEY", "NAME of the environment variable with the key; null: no key")
    model_name: str = Field("gpt-4o", description="the model that is asked for")
    temperature: float | None = Field(0.0, ge=0, description="null: the endpoint's own")
    max_tokens: int | None = Field(None, ge=1, description="longest reply; null: the endpoint's own")
    structured_output: bool = Field(
        False, description="ask for a JSON object with the score (response_format), where it is supported"
    )
    timeout: float = runtime(60.0, "seconds for one request, from connecting to its last byte", gt=0)
    max_concurrency: int = runtime(8, "requests under way at a time, per process", ge=1, le=1024)
    max_retries: int = runtime(6, "further attempts after 429, 5xx, a timeout or a broken reply", ge=0)
    backoff: float = runtime(1.0, "seconds that the first wait is drawn below; doubles, to 60", gt=0, le=60)
    requests_per_minute: float | None = runtime(None, "limit, per process; null: none", gt=0)
    max_requests: int | None = runtime(None, "budget of one command, retries included; null: none", ge=1)
    # No ingredient: the error about a refusal advises it, and replies that were paid for must count then.
    skip_refused: bool = runtime(
        False, "leave an answer that the endpoint refuses (400, 413, 422) unscored instead of stopping"
    )

    @field_validator("api_key", mode="before")
    @classmethod
    def _only_a_name(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or is_secret("api_key", value)):
            raise ConfigError(
                f"{PLACE}.api.api_key holds something else than the name of an environment variable "
                "(not shown here, in case it is a key).",
                "A key in a configuration ends up in files and version control.",
                "Put the key into an environment variable and give that variable's name in capitals, "
                "with an underscore, such as DF_API_KEY; null where the endpoint takes no key.",
            )
        return value

    @model_validator(mode="after")
    def _check_url(self) -> ApiSettings:
        check_url(self.api_url, sends_key=self.api_key is not None)
        return self


class RewardModelSettings(Settings):
    """A sequence-classification model whose output is the reward."""

    hf_model_name_or_path: str | None = Field(None, description="folder or hub name")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what runs it")
    output: Literal["logit", "sigmoid", "softmax"] = Field(
        "logit", description="the raw logit, its sigmoid, or the softmax probability of the label"
    )
    label: int = Field(0, ge=0, description="which of the model's outputs")
    max_length: int | None = Field(
        None, ge=1, description="tokens; a longer text is unscored; null: the model's own limit"
    )
    batch_tokens: int = runtime(16384, "padded tokens per batch", ge=1)
    gpu_memory_utilization: float = runtime(0.9, "share of the accelerator's memory, vllm only", gt=0, le=1)
    trust_remote_code: bool = Field(False, description="let the model bring Python code of its own")


class MetricSettings(Settings):
    """A function of (prompt, completion, reference)."""

    name: str = Field(
        "exact_match",
        description="exact_match, contains, f1, rouge_l, chrf, bleu, valid_json, numeric, "
        "or module:function (or file.py:function) of your own",
    )
    bleu_tokenize: str = Field(
        "13a", description="tokenizer of bleu: 13a, intl, zh, ja-mecab, char, none ..."
    )


BACKENDS: Mapping[str, type[Settings]] = {
    "local_vllm": LocalVllmSettings,
    "api": ApiSettings,
    "reward_model": RewardModelSettings,
    "metric": MetricSettings,
}


def read_settings(backend: str, params: Mapping[str, Any]) -> Settings:
    """Check every backend's settings and return the chosen one's.

    Args:
        backend: local_vllm, api, reward_model or metric.
        params: backend -> its settings, as the guide nests them; a backend may be missing or null.

    Raises:
        ConfigError: an unknown backend or key, or a value that cannot be used, of any backend.
    """
    for name in params:
        if name not in BACKENDS:
            raise ConfigError(
                f"{PLACE}.{name} is none of the reward backends.{did_you_mean(name, BACKENDS)}",
                f"They are: {', '.join(BACKENDS)}.",
                f"Correct or remove it; each backend's settings stand below {PLACE}.<backend>.",
            )
    if backend not in BACKENDS:
        raise ConfigError(
            f"nice.reward_model_backend: {backend} is not known.{did_you_mean(str(backend), BACKENDS)}",
            f"The backends are: {', '.join(BACKENDS)}.",
            "Choose one of them.",
        )
    made = {name: _checked(name, params.get(name)) for name in BACKENDS}
    chosen = made[backend]
    if isinstance(chosen, RewardModelSettings) and not chosen.hf_model_name_or_path:
        raise ConfigError(
            "nice.reward_model_backend: reward_model was chosen without a model.",
            "There is no reward model that would fit every task.",
            f"Set {PLACE}.reward_model.hf_model_name_or_path to a folder or hub name.",
        )
    return chosen


def _checked(backend: str, values: Any) -> Settings:
    kind = BACKENDS[backend]
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(
            f"{PLACE}.{backend} is not a mapping.",
            "It holds the backend's settings by name.",
            f"The settings of {backend} are: {', '.join(kind.model_fields)}.",
        )
    try:
        return kind(**(values or {}))
    except ValidationError as error:
        raise _bad_setting(backend, kind, error) from None  # the original shows values, and one may be a key


def _bad_setting(backend: str, kind: type[Settings], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(
            f"{PLACE}.{backend}.{key} is not a setting of {backend}.{did_you_mean(key, kind.model_fields)}",
            f"{backend} takes: {', '.join(kind.model_fields)}.",
            "Correct the name, or remove it.",
        )
    shown = "" if not key or is_secret_name(key) else f": {first['input']!r}"
    info = kind.model_fields.get(key)
    return ConfigError(
        f"{PLACE}.{backend}{'.' + key if key else ''}{shown} cannot be used.",
        f"{first['msg'].removeprefix('Value error, ')}.",
        f"{key}: {info.description} (default {info.default})." if info else "Correct the settings.",
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def endpoint(url: str) -> str:
    """Return an address as it may be shown: without user, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_url(url: str, *, sends_key: bool) -> None:
    """Refuse an address that cannot be asked, that holds a secret, or that would send the key in the clear.

    Plain http is taken where no key is sent (a server inside a cluster), or to this machine itself.

    Raises:
        ConfigError: any of that; secrets are not shown.
    """
    where = f"{PLACE}.api.api_url"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(
            f"{where} is not the address of an endpoint.",
            "It begins with https:// (or http://) and a host, such as "
            "https://api.openai.com/v1/chat/completions.",
            "Give the full address, up to and including /chat/completions.",
        )
    if _may_hold_secret(parts):
        raise ConfigError(
            f"{where} holds what may be a user name, password or key (not shown).",
            "An address ends up in tables, logs, messages and the model card, so beside host and path it may "
            f"only have the query parameters {', '.join(QUERY)}.",
            "Take the rest out of the address; api_key names the environment variable that holds the key.",
        )
    if sends_key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ConfigError(
            f"{where}: {endpoint(url)} is plain http, and api_key is set.",
            "Everybody on the way could read the key.",
            "Use https://, or set api_key: null where the endpoint takes no key.",
        )


def _may_hold_secret(parts: SplitResult) -> bool:
    query = parse_qsl(parts.query, keep_blank_values=True)
    return (
        "@" in parts.netloc
        or bool(parts.fragment)
        or any(name.lower() not in QUERY or not _QUERY_VALUE.fullmatch(value) for name, value in query)
    )
