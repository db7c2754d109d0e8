"""What a run will cost before it is run: counts, a short calibration, and what follows from both."""
