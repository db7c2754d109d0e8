"""Per-sample gradients: captured in one batched backward, Adam-preconditioned, projected, dropped."""
