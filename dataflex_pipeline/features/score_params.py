"""Parameters of scores that methods share: a model that scores, a judge of the pool, the words of rows."""

from __future__ import annotations

from typing import Any, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)

from dataflex_pipeline import api
from dataflex_pipeline.data.chat.templates import TEMPLATES
from dataflex_pipeline.data.texts import Text
from dataflex_pipeline.features.params import RewardParams, backend_defaults, backend_meanings, by_name
from dataflex_pipeline.reward.address import named_for
from dataflex_pipeline.reward.grading_prompts import BEST, PROMPT, SYSTEM
from dataflex_pipeline.reward.rewarders import SHIPPED, read_settings
from dataflex_pipeline.reward.settings import JudgeSettings, Settings


class ScoreModelParams(api.Params):
    """A model that scores instead of the run's own."""

    score_model: str | None = Field(
        None, description="folder or hub name of a (small) model that scores; null: the run's own model"
    )
    score_revision: str | None = Field(
        None, exclude=True, description="branch, tag or commit of a hub score_model"
    )
    score_template: str | None = Field(
        None, description="named template that score_model's rows are written with; null: its tokenizer's own"
    )

    @field_serializer("score_model")
    def _score_model_by_name(self, value: str | None) -> str | None:
        return by_name(value)

    @model_serializer(mode="wrap")
    def _where_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave a score_model that is not set out of a dump: the tables are those of a version without it."""
        return {
            name: value
            for name, value in dump(self).items()
            if value is not None or name not in ScoreModelParams.model_fields
        }

    @model_validator(mode="after")
    def _check_score_model(self) -> Self:
        if self.score_template is not None and self.score_template not in TEMPLATES:
            raise ValueError(f"score_template is none of {', '.join(TEMPLATES)}")
        if self.score_model is None and (self.score_template or self.score_revision):
            raise ValueError("score_template and score_revision are those of a score_model, and none is set")
        return self


class ScoredParams(ScoreModelParams):
    """Parameters of the score_losses feature."""

    alone: bool = Field(False, description="each response by itself, without what was asked")


class WordParams(api.Params):
    """Parameters of the words feature."""

    text: Text = Field("conversation", description="what of a row its terms are taken from")


def grading_defaults() -> dict[str, dict[str, Any]]:
    """Return every reward backend's settings and their defaults where rows of the pool are graded."""
    defaults = backend_defaults()
    for name, kind in SHIPPED.items():
        if issubclass(kind, JudgeSettings):
            defaults[name]["max_score"] = BEST
    return defaults


class GradeParams(RewardParams):
    """What grades the rows of the pool: parameters of the grades feature."""

    reward_backend_params: dict[str, Any] = Field(
        default_factory=grading_defaults,
        exclude=True,  # the table of grades says what of it decides a grade
        description="settings by backend: local_vllm, api, reward_model, metric; those of your own: settings",
        json_schema_extra=backend_meanings(),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        with named_for("judge"):
            settings = grading_settings(self)
        if isinstance(settings, JudgeSettings) and settings.max_score <= 1:
            raise ValueError("grades go from 1 to max_score, which has to be above 1")
        return self


def grading_settings(params: GradeParams) -> Settings:
    """Return the chosen backend's settings: a judge in words gets the prompts and the scale of grades.

    Raises:
        ConfigError: an unknown backend or key, or a value that cannot be used, of any backend.
    """
    given = dict(params.reward_backend_params)
    for name, kind in SHIPPED.items():
        own = given.get(name)
        if issubclass(kind, JudgeSettings) and isinstance(own, dict | None):
            chosen = {key: value for key, value in (own or {}).items() if value is not None}
            shipped = {"max_score": BEST, "prompt": PROMPT, "system_prompt": SYSTEM}
            given[name] = (own or {}) | shipped | chosen
    return read_settings(params.reward_model_backend, given)
