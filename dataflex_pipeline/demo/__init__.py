"""The embedded demo: a small corpus with several skills and a small model, made on the spot."""

from dataflex_pipeline.demo.make import Demo, DemoSettings, ensure_demo, find_demo

__all__ = ["Demo", "DemoSettings", "ensure_demo", "find_demo"]
