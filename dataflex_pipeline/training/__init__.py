"""Training of one round on a weighted index, as a stretch of one long run that spans all rounds."""

from dataflex_pipeline.store.stale import MARKER
from dataflex_pipeline.training.marker import Marker, read_marker, verify_checkpoint
from dataflex_pipeline.training.plan import RoundPlan, RoundResult
from dataflex_pipeline.training.rounds import train_round

__all__ = ["MARKER", "Marker", "RoundPlan", "RoundResult", "read_marker", "train_round", "verify_checkpoint"]
