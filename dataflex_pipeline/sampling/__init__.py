"""From scores to the weighted index: probabilities, draws, quotas, weights; streaming over the tables."""

from dataflex_pipeline.sampling.draw import draw, draw_uniform, top_k_probabilities
from dataflex_pipeline.sampling.exported import export_probabilities
from dataflex_pipeline.sampling.probabilities import (
    ProbabilitySummary,
    import_probabilities,
    write_probabilities,
)
from dataflex_pipeline.sampling.settings import Drawn, DrawSettings
from dataflex_pipeline.sampling.uniforms import row_uniforms

__all__ = [
    "DrawSettings",
    "Drawn",
    "ProbabilitySummary",
    "draw",
    "draw_uniform",
    "export_probabilities",
    "import_probabilities",
    "row_uniforms",
    "top_k_probabilities",
    "write_probabilities",
]
