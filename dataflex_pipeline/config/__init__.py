"""The run configuration: YAML plus key=value overrides, strict, with suggestions. Never imports torch.

``fields`` declares every key; ``load`` lays defaults, files and overrides over each other; ``peer`` knows the
keys of LLaMA-Factory and DataFlex; ``components`` the parameters of methods; ``checks`` what does not go
together; ``render`` writes the commented file; ``redaction`` keeps secrets out of everything written.
"""
