"""All that an extension subclasses: Feature, Method, Need, and the small protocols around them.

The way of a score: a *feature* is one costly array per row, computed once, cached and shared; a *method*
names the features it needs and does cheap arithmetic on them, block by block, twice:

    begin(tables) -> state          once, may read whole feature tables as a stream
    score(block, state)             feature blocks -> score columns
    fit(scores) -> fitted           once, may read the finished score table as a stream
    weigh(block, fitted)            score blocks -> unnormalised sampling weights
"""

from dataflex_pipeline.api.feature import (
    Backend,
    BlockTable,
    Feature,
    FeatureInput,
    Need,
    Params,
    Split,
    own_feature,
)
from dataflex_pipeline.api.method import Block, Checkpoint, Method, Selection, Strategy, TargetRanking
from dataflex_pipeline.reporting import Progress, Silent

__all__ = [
    "Backend",
    "Block",
    "BlockTable",
    "Checkpoint",
    "Feature",
    "FeatureInput",
    "Method",
    "Need",
    "Params",
    "Progress",
    "Selection",
    "Silent",
    "Split",
    "Strategy",
    "TargetRanking",
    "own_feature",
]
