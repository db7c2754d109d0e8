"""Estimate of a run before it is run: counts, a short calibration, and the costs that follow from both."""
