"""Checks of the environment and of a configuration before a run, each with its remedy."""
