"""Known decoders in numbers, beside the numbers of transformers' own modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import headers
import pytest
import torch
import transformers
from models import MODELS
from patience import HANGS_S
from test_outline import without_weights

from offload.checkpoint.decoders import DECODERS
from offload.checkpoint.outline import sketch
from offload.checkpoint.recognition import recognise
from offload.io.safetensors import read_checkpoint
from offload.specs import ModelSpec

UNKNOWN = {"gpt2", "gpt_neox", "opt", "bloom", "falcon"}


def recognised(directory: Path, dtype: str = "auto") -> ModelSpec | None:
    config = json.loads((directory / "config.json").read_text())
    has_headers = any(directory.glob("*.safetensors"))
    entries = read_checkpoint(directory, is_whole=False).entries if has_headers else None
    return recognise(config, entries, dtype)


def change(directory: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_the_modules_say(name: str, tmp_path: Path) -> None:
    for stored in (torch.float32, torch.bfloat16):
        whole = MODELS[name].save(tmp_path / f"{stored}", stored)
        bare = without_weights(whole, tmp_path / f"{stored}-bare")
        nothing = tmp_path / f"{stored}-nothing"
        nothing.mkdir()
        (nothing / "config.json").write_bytes((whole / "config.json").read_bytes())
        for folder in (whole, bare, nothing):
            for dtype in ("auto", "bfloat16", "float32"):
                found = recognised(folder, dtype)
                assert (found is None) == (name in UNKNOWN)
                if found is not None:
                    assert found == sketch(folder, dtype=dtype).spec


@pytest.mark.parametrize("name", sorted(set(MODELS) - UNKNOWN))
def test_what_a_configuration_leaves_out_is_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    """Headers of a model that follows the class's defaults, with none of them written down."""
    whole = MODELS[name].save(tmp_path / "whole")
    kind = json.loads((whole / "config.json").read_text())["model_type"]
    decoder = DECODERS[kind]
    default = getattr(transformers, MODELS[name].config)()
    assert default.tie_word_embeddings == decoder.is_tied
    for key, value in decoder.only.items():
        assert getattr(default, key) == value
    change(whole, drop=(*decoder.only, "dtype", "transformers_version"))
    assert recognised(whole) == sketch(whole).spec
    left_out = (
        "tie_word_embeddings",
        "num_key_value_heads",
        "head_dim",
        "num_hidden_layers",
        "max_position_embeddings",
    )
    for key in left_out:
        text = (whole / "config.json").read_text()
        change(whole, drop=(key,))
        found = recognised(whole)
        (whole / "config.json").write_text(text)
        if found is not None:
            change(whole, drop=(key,))
            assert found == sketch(whole).spec
            (whole / "config.json").write_text(text)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = MODELS["llama"].save(tmp_path / "whole")
    for file in whole.glob("*.safetensors"):
        tensors = load_file(file)
        save_file(tensors, file, {"format": "pt"})
    change(whole, tie_word_embeddings=True)
    assert recognised(whole) == sketch(whole).spec
    change(whole, tie_word_embeddings=None)
    assert recognised(whole) is None


@pytest.mark.parametrize(
    "values",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        {"num_hidden_layers": 6},
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": True},
        {"hidden_size": 65},
        {"num_attention_heads": 0},
        {"vocab_size": "320"},
        {"vocab_size": 321},
        {"intermediate_size": 97},
        {"model_type": "llama4_text"},
        {"model_type": ["llama"]},
        {"dtype": "float8_e4m3fn"},
    ],
)
def test_anything_unusual_is_left_to_the_modules(values: dict[str, Any], tmp_path: Path) -> None:
    whole = MODELS["llama"].save(tmp_path / "whole")
    assert recognised(whole) is not None
    change(whole, **values)
    assert recognised(whole) is None


def test_an_embedding_that_outweighs_the_layers(tmp_path: Path) -> None:
    tiny = MODELS["llama"]
    whole = type(tiny)(tiny.config, tiny.sizes | {"vocab_size": 4000}).save(tmp_path / "whole")
    assert recognised(whole) is None
    assert sketch(whole).spec.params > 0


def test_large_models(tmp_path: Path) -> None:
    for name, config in (("dense", headers.LLAMA_70B), ("mixture", headers.MOE_160 | {"num_hidden_layers": 3})):
        folder = headers.write(tmp_path / name, config)
        assert recognised(folder) == sketch(folder).spec


def test_no_torch_is_loaded() -> None:
    code = "import sys, offload.checkpoint.recognition; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANGS_S)
    assert done.stdout.strip() == "set()"
