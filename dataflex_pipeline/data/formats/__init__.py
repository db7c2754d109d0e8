"""Formats of rows: which one a source has, and each of them as conversations."""
