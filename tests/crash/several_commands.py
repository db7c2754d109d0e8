"""Several commands in one launch, since starting processes takes longer than all of them."""

from __future__ import annotations

import json
import sys

from dataflex_pipeline.stages import cli

from dataflex_pipeline import launch
from dataflex_pipeline.launch.team import end_now
from dataflex_pipeline.process import several
from dataflex_pipeline.process.exits import exit_code


def _all() -> int:
    code = 0
    for arguments in json.loads(sys.argv[1]):
        sys.argv = ["dataflex", *arguments]
        code = code or exit_code(cli.app)
    return code


if __name__ == "__main__":
    end_now(_all() if launch.world_size() == 1 else several.run(_all))
