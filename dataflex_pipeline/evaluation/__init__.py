"""Evaluation of the model of a round: losses, generated answers, and benchmark tasks."""
