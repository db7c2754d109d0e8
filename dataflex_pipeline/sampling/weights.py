"""Loss weights of a selection, mean 1.

``uniform``: 1. ``importance``: the inverse of how often a row is expected in the selection, which takes the
method's preference out of the loss again (Horvitz and Thompson, "A generalization of sampling without
replacement from a finite universe", JASA 47, 1952). With replacement a row is drawn n p times on average,
so the weight is proportional to 1/p (1/(N p) before the mean is made 1; the N valid rows cancel). Without,
row i is in when its key E_i/p_i lies below tau, the smallest key left out, and that has the probability
1 - exp(-p_i tau) given the keys of the other rows; so the weight is 1/(1 - exp(-p_i tau)), and 1 for all
when every row was drawn (tau infinite). See Duffield, Lund and Thorup, "Priority sampling for estimation of
arbitrary subset sums", JACM 54, 2007, for thresholds of this kind. ``probability``: proportional to p.

Importance weights divided by their mean, which is drawn too, are self-normalised (Hajek's estimator): the
weighted mean loss of a selection of n rows estimates the pool's with a bias of order 1/n, right only as n
grows, where the weights before the division are unbiased at any n. In return a loss that is the same for all
rows is estimated exactly, and the size of a step does not depend on the draw.

Under quotas the weights have mean 1 within each quota: they undo (or follow) the probabilities among the
rows of one source and leave the share of the source as it was set.
"""

from __future__ import annotations

import numpy as np

from dataflex_pipeline.sampling.selection import Selection
from dataflex_pipeline.sampling.settings import Weights
from dataflex_pipeline.sampling.uniforms import Floats


def weigh(selection: Selection, kind: Weights) -> Floats:
    """Return the weight of every row of a selection, mean 1. [n] float64"""
    p = selection.probabilities
    if kind == "uniform" or not len(p):
        return np.ones(len(p))
    if kind == "probability":
        return _mean_one(p)
    if selection.tau is None:
        return _mean_one(p.min() / p)
    with np.errstate(over="ignore"):
        inclusion = -np.expm1(-p * selection.tau)
    return _mean_one(1 / inclusion)


def _mean_one(weights: Floats) -> Floats:
    # The largest first becomes 1, so that very small probabilities do not underflow in the sum.
    scaled: Floats = weights / weights.max()
    scaled /= scaled.mean()
    return scaled


def float32_mean_one(weights: Floats) -> np.ndarray:
    """Return weights as float32 after making their mean exactly 1 in float64. [n] float32"""
    if not len(weights):
        return weights.astype(np.float32)
    return _mean_one(weights).astype(np.float32)
