"""Offline data selection for LLM fine-tuning, as files: score, select, train, go round again."""

__version__ = "0.1.0"
