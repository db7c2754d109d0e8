"""What every refused configuration has in common: three parts, exit code 2, no jargon."""

import re

import pytest

from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.errors import ConfigError


def refused(path, overrides=(), base=None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides), base)
    error = caught.value
    assert error.exit_code == 2
    assert all(part.strip() for part in (error.what, error.why, error.fix))
    jargon = re.compile(
        r"pydantic|Traceback|(?:string|int|float|bool)_type|_parsing|model_validate|Errno|NoneType",
        re.IGNORECASE,
    )
    assert not jargon.search(str(error))
    return error
