"""The viewer of a run in a browser of this machine."""
