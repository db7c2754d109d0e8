"""Is everything fit to run? Checks of the environment and of a configuration, and what to do about it."""
