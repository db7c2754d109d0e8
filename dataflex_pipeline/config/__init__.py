"""The run configuration: YAML plus key=value overrides, strict, with suggestions. Never imports torch."""
