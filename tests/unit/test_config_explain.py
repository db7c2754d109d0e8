"""Pydantic's errors in three parts."""

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dataflex_pipeline.config.explain import explain


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = Field(1.0, gt=0, description="calls per second")
    api_key: int = Field(0, gt=0, description="the key")
    retries: int = Field(2, description="further tries")

    @model_validator(mode="after")
    def _together(self):
        if self.retries and self.rate > 10:
            raise ValueError("retries needs a rate of at most 10")
        return self


def refused(values, **words):
    with pytest.raises(ValidationError) as raised:
        Settings(**values)
    return explain(raised.value, Settings, "judge.api", **words)


def test_an_unknown_name():
    error = refused({"retris": 1}, noun="setting", place="my.yaml, line 3", see="Read the manual.")
    assert (
        error.what == "judge.api.retris (in my.yaml, line 3) is not a setting of api. Did you mean 'retries'?"
    )
    assert error.why == "api takes: rate, api_key, retries."
    assert error.fix == "Correct the name, or remove it. Read the manual."


def test_a_value_out_of_range():
    error = refused({"rate": -1})
    assert error.what == "judge.api.rate is -1."
    assert error.why == "Input should be greater than 0."
    assert error.fix == "rate: calls per second (default 1.0)."


def test_a_secret_is_not_shown():
    assert "1234" not in str(refused({"api_key": -1234}))


def test_values_that_do_not_go_together():
    error = refused({"rate": 20.0}, place="the command line")
    assert error.what == "The parameters of judge.api (in the command line) cannot be used as they are."
    assert error.why == "retries needs a rate of at most 10."
    assert "judge.api.NAME=VALUE" in error.fix
