"""The pipeline: a run as an object, its outputs in order, and how each is made. Nothing here prints."""
