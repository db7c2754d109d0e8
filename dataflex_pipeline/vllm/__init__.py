"""vLLM in a process of its own, shared by the vLLM embedder, generator and judge."""
