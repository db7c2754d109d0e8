"""Base models, adapters, tokenizers and the optimizer states of a checkpoint, by parameter name."""
