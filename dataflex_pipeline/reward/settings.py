"""The settings of the shipped rewarders, as they stand below ``reward_backend_params``, and their defaults.

A settings class says all that the rest of the program has to know about its rewarder: its name, what decides
a reward, whether it can be used, what it costs. The rewarder itself is imported when it is made.

Only the chosen backend's settings count in a fingerprint, and of those only what can change a reward:
fields marked *runtime* (timeouts, concurrency, budgets, memory) are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from dataflex_pipeline.config.redaction import is_secret
from dataflex_pipeline.declared import broken, shown
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reward import Rewarder
from dataflex_pipeline.reward.address import PLACE, check_url
from dataflex_pipeline.store.fingerprint import canonical, digest


def runtime(default: Any, description: str, **limits: Any) -> Any:
    """Return a field that changes how a reward is computed and not which one: no part of fingerprints."""
    return Field(default, description=f"{description} (runtime)", exclude=True, **limits)


@dataclass(frozen=True)
class AnswerTokens:
    """Mean tokens of what a judge is shown: the conversation before the answer, the answer, the row's own."""

    prompt: float
    completion: float
    reference: float


@dataclass(frozen=True)
class RewardCost:
    """What judging is predicted to take.

    Attributes:
        note: what is uncertain.
        requests: to a remote endpoint, at most.
        tokens: sent to it.
        seconds: None where nothing is known.
    """

    note: str
    requests: int = 0
    tokens: float = 0.0
    seconds: float | None = None


class Settings(BaseModel):
    """The settings of one kind of rewarder, strict and fixed once made, and what follows from them.

    Attributes:
        backend: the name that ``reward_model_backend`` chooses it by.
        in_words: whether it replies in words: a reply without a score is asked for once more.
        paid: whether its replies cost money: each is flushed to the disk before the next is waited for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    backend: ClassVar[str]
    in_words: ClassVar[bool] = False
    paid: ClassVar[bool] = False

    @property
    def journalled(self) -> bool:
        """Whether a reward takes long enough to be written down as soon as it is known."""
        return True

    @property
    def subject(self) -> str:
        """The model, function or file that judges."""
        raise NotImplementedError

    def require(self) -> None:
        """Check what a chosen rewarder cannot do without, and one that is not chosen can.

        Raises:
            ConfigError: a setting without a default is missing.
        """

    def identity(self, config: Any) -> dict[str, Any]:
        """Return what decides a reward, for the fingerprint.

        Args:
            config: the run's.
        """
        return {"settings": self.model_dump(mode="json")}

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make the rewarder; entering it loads.

        Args:
            config: the run's, for device and precision.
            say: prints one line.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Check what is needed beside the settings, before anything costly is done; no model is loaded.

        Raises:
            UserError: a package, a file or an environment variable is missing, or cannot be used.
        """

    def reach(self) -> Sequence[str]:
        """Try the endpoint, where there is one, at no cost; return what is doubtful about it.

        Raises:
            UserError: it cannot be reached.
        """
        return ()

    def cost(self, answers: int, each: AnswerTokens) -> RewardCost:
        """Predict what judging takes.

        Args:
            answers: how many are judged.
            each: the tokens of one.
        """
        return RewardCost(f"the judge {self.subject} is not loaded to estimate")


def identity_of(settings: Settings, config: Any) -> Mapping[str, Any]:
    """Return what decides a reward by some settings, for the fingerprint.

    Raises:
        ConfigError: those of the user's own say what a fingerprint cannot hold.
    """
    found: Any = settings.identity(config)
    said = "It returns a mapping from names to text, numbers, true or false, lists and mappings."
    try:
        if not isinstance(found, Mapping):
            raise TypeError(f"it is {shown(found)}")
        canonical(found)
    except TypeError as error:
        wrong = f"returns what cannot be written down: {error}"
        raise broken(settings, "identity()", wrong, said) from error
    return found


class JudgeSettings(Settings):
    """How a language model is asked for a score; null takes the prompts of `judge_prompts`."""

    max_score: float = Field(1.0, gt=0, description="best score; the judge is told, the reward is score / it")
    show_reference: bool = Field(
        True, description="show the judge the target row's own answer, where it has one"
    )
    system_prompt: str | None = Field(None, description="what the judge is told first; null: the shipped one")
    prompt: str | None = Field(
        None, description="text with {prompt} and {completion}, without a reference; null: the shipped one"
    )
    prompt_with_reference: str | None = Field(
        None, description="text with {prompt}, {completion} and {reference}; null: the shipped one"
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

    def identity(self, config: Any) -> dict[str, Any]:
        """Return the settings, and the prompts that they lead to."""
        from dataflex_pipeline.reward.judge_prompts import prompt_texts

        return super().identity(config) | {"prompts": digest(prompt_texts(self))}


class LocalVllmSettings(JudgeSettings):
    """A judge that vLLM runs on this machine."""

    backend: ClassVar[str] = "local_vllm"
    in_words: ClassVar[bool] = True

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

    @property
    def subject(self) -> str:
        """The judge's folder or hub name."""
        return self.hf_model_name_or_path

    def identity(self, config: Any) -> dict[str, Any]:
        """Return the settings and prompts, with the judge's files in place of its name."""
        return _by_files(super().identity(config), self, self.trust_remote_code)

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make the judge."""
        from dataflex_pipeline.reward.local_vllm import LocalVllmRewarder

        return LocalVllmRewarder(self, config, say)

    def check(self) -> None:
        """Check that vLLM is there and that the judge's files are those of one."""
        from dataflex_pipeline.reward.local_vllm import LocalVllmRewarder

        LocalVllmRewarder(self, None, _unheard).check()


class ApiSettings(JudgeSettings):
    """A judge behind an OpenAI-compatible chat endpoint."""

    backend: ClassVar[str] = "api"
    in_words: ClassVar[bool] = True
    paid: ClassVar[bool] = True

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

    @property
    def subject(self) -> str:
        """The name of the model that is asked for."""
        return self.model_name

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make what asks the endpoint."""
        from dataflex_pipeline.reward.api import ApiRewarder

        return ApiRewarder(self, config, say)

    def check(self) -> None:
        """Check that the environment holds the key, and that the budget is enough for all processes."""
        from dataflex_pipeline.reward.api import own_budget, read_key

        read_key(self)
        own_budget(self)

    def reach(self) -> Sequence[str]:
        """Ask the endpoint for its models."""
        from dataflex_pipeline.reward.api import read_key
        from dataflex_pipeline.reward.endpoint import try_endpoint

        return try_endpoint(self, read_key(self))

    def cost(self, answers: int, each: AnswerTokens) -> RewardCost:
        """Count the requests and what they send; the seconds follow from a rate limit alone."""
        from dataflex_pipeline.reward.judge_prompts import instruction_tokens

        reference = each.reference if self.show_reference else 0.0
        tokens = answers * (each.prompt + each.completion + reference + instruction_tokens(self))
        note = (
            f"requests to {self.subject} at most, retries aside: equal answers are asked once; tokens are "
            "those sent, as the model to be trained would count them"
        )
        if self.requests_per_minute is None:
            return RewardCost(note, answers, tokens)
        seconds = 60.0 * answers / self.requests_per_minute
        return RewardCost(f"{note}; at its rate limit", answers, tokens, seconds)


class RewardModelSettings(Settings):
    """A sequence-classification model whose output is the reward."""

    backend: ClassVar[str] = "reward_model"

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

    @property
    def subject(self) -> str:
        """The model's folder or hub name."""
        return self.hf_model_name_or_path or ""

    def require(self) -> None:
        """Check that a model is named."""
        if not self.hf_model_name_or_path:
            raise ConfigError(
                "nice.reward_model_backend: reward_model was chosen without a model.",
                "There is no reward model that would fit every task.",
                f"Set {PLACE}.reward_model.hf_model_name_or_path to a folder or hub name.",
            )

    def identity(self, config: Any) -> dict[str, Any]:
        """Return the settings and the precision, with the model's files in place of its name."""
        return _by_files(super().identity(config), self, self.trust_remote_code) | {"bf16": config.bf16}

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make what runs the model."""
        from dataflex_pipeline.reward.reward_model import ModelRewarder

        return ModelRewarder(self, config, say)

    def check(self) -> None:
        """Check that the files are those of a reward model that gives what is asked for."""
        from dataflex_pipeline.reward.reward_model import ModelRewarder

        ModelRewarder(self, None, _unheard).check()


class MetricSettings(Settings):
    """A function of (prompt, completion, reference)."""

    backend: ClassVar[str] = "metric"

    name: str = Field(
        "exact_match",
        description="exact_match, contains, f1, rouge_l, chrf, bleu, valid_json, numeric, "
        "or module:function (or file.py:function) of your own",
    )
    bleu_tokenize: str = Field(
        "13a", description="tokenizer of bleu: 13a, intl, zh, ja-mecab, char, none ..."
    )

    @property
    def journalled(self) -> bool:
        """Whether the function is the user's own: a shipped one is sooner computed than written down."""
        return ":" in self.name

    @property
    def subject(self) -> str:
        """The metric's name."""
        return self.name

    def identity(self, config: Any) -> dict[str, Any]:
        """Return the settings, and the file of a function of the user's own."""
        from dataflex_pipeline.reward.metric import source_digest

        return super().identity(config) | {"function": source_digest(self.name)}

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make what calls the function."""
        from dataflex_pipeline.reward.metric import MetricRewarder

        return MetricRewarder(self, config, say)

    def check(self) -> None:
        """Check that there is such a function, and the package that a shipped one needs."""
        self.rewarder(None, _unheard)

    def cost(self, answers: int, each: AnswerTokens) -> RewardCost:
        """Say that a function is not measured."""
        return RewardCost("a function; not measured")


def _unheard(line: str) -> None:
    """Take a line that nobody is to read."""


def _by_files(identity: dict[str, Any], settings: Settings, trust_remote_code: bool) -> dict[str, Any]:
    """Put the files of a model in place of its name, because a folder may move."""
    from dataflex_pipeline.reward.judge_files import JudgeFiles

    del identity["settings"]["hf_model_name_or_path"]
    files = JudgeFiles(settings.subject, settings.backend, trust_remote_code)
    return identity | {"model": files.identity}
