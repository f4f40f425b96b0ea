"""Weights in fewer bits: lossless ones change no bit of any result, the others give one result wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS

import offload
from offload.checkpoint.packable import packable
from offload.kernels.formats.weights import parse_weights
from offload.runtime.packed import Packed

PROMPT = torch.tensor([[44, 45, 46, 47, 48, 49, 300, 51], [5, 9, 200, 31, 7, 44, 3, 8]])
PLACES: dict[str, dict[str, Any]] = {
    "all on disk": {"resident": 0},
    "half in memory": {"resident": 0.5, "slots": 1},
    "device, host and disk": {"device": "emulated", "gpu_memory": "1GiB", "resident": 0.5},
    "everything fits": {},
}
ARCHITECTURES = ("llama-tied", "qwen2", "gpt2", "qwen3_moe")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param].save(tmp_path_factory.mktemp(request.param), torch.bfloat16)


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> dict[str, Path]:
    """The checkpoint in every format; where nothing can be packed, it is a plain copy."""
    found = {}
    for weights in ("lossless", "int8", "int4"):
        found[weights] = checkpoint.with_name(f"{checkpoint.name}-{weights}")
        offload.pack(checkpoint, found[weights], weights=weights)
    return found


def outputs(path: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt and of steps, and greedy tokens."""
    with offload.load(path, strict=True, context=32, batch=2, **options) as model:
        found = model.generate(
            PROMPT, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        )
        with torch.no_grad():
            whole = model(PROMPT).logits
    return torch.cat([torch.stack(found.logits).flatten(), whole.flatten()]), found.sequences


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_lossless_changes_no_bit(checkpoint: Path, packed: dict[str, Path], exact: bool) -> None:
    logits, tokens = outputs(checkpoint, exact=exact)
    for place in list(PLACES)[exact * 2 :]:
        found = outputs(packed["lossless"], exact=exact, **PLACES[place])
        assert torch.equal(found[0], logits), place
        assert torch.equal(found[1], tokens), place
    made = outputs(checkpoint, exact=exact, weights="lossless", resident=0.5)
    assert torch.equal(made[0], logits)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_approximate_formats_give_one_result_in_every_place(packed: dict[str, Path], weights: str) -> None:
    logits, tokens = outputs(packed[weights], exact=False)
    for place in PLACES.values():
        found = outputs(packed[weights], exact=False, **place)
        assert torch.equal(found[0], logits), place
        assert torch.equal(found[1], tokens), place


@pytest.mark.parametrize("weights", ["int8", "int4-64", "int4-32-symmetric"])
def test_made_while_loading_is_what_pack_makes(checkpoint: Path, weights: str, tmp_path: Path) -> None:
    report = offload.pack(checkpoint, tmp_path / "packed", weights=weights)
    with offload.load(checkpoint, weights=weights, context=32) as model:
        made = [n for n, p in model.named_parameters() if type(p) is Packed]
    assert sorted(made) == sorted(report.packed)
    logits, _ = outputs(tmp_path / "packed")
    assert torch.equal(outputs(checkpoint, weights=weights)[0], logits)


def test_the_format_is_near(checkpoint: Path, packed: dict[str, Path]) -> None:
    plain = outputs(checkpoint)[0][: 2 * 320]  # the first step, before tokens differ
    eight, four = (outputs(packed[w])[0][: 2 * 320] for w in ("int8", "int4"))
    assert (eight - plain).norm() <= 0.03 * plain.norm()
    assert (four - plain).norm() <= 0.3 * plain.norm()


def test_routers_heads_and_tables_stay(tmp_path: Path) -> None:
    from offload.checkpoint import open_checkpoint
    from offload.io.engine import Engine

    with Engine() as engine:
        for name in ("llama-tied", "mixtral"):
            opened = open_checkpoint(MODELS[name].save(tmp_path / name, torch.bfloat16), engine)
            config = opened.model.config
            four, lossless = (
                set(packable(opened.anatomy, opened.sources, config, format, blocks_only=False))
                for format in (parse_weights("int4"), parse_weights("lossless"))
                if format is not None
            )
            assert four < lossless
            assert not [n for n in four if "embed" in n or "head" in n or "norm" in n or ".gate.weight" in n]
            assert any("embed" in n or "head" in n for n in lossless)


def test_unknown_formats_are_refused_with_the_known_ones() -> None:
    for text in ("int3", "int4-48", "int8-32", "lossless-symmetric", ""):
        with pytest.raises(offload.UsageError, match="lossless, int8, int4"):
            parse_weights(text)
    assert [str(parse_weights(t)) for t in ("int4", "int4-128-symmetric", "int8", None)] == [
        "int4-32", "int4-128-symmetric", "int8", "None",
    ]  # fmt: skip


def test_a_packed_matrix_is_still_a_matrix(packed: dict[str, Path], checkpoint: Path) -> None:
    with offload.load(checkpoint, context=8) as model:
        plain = {n: p.clone() for n, p in model.named_parameters()}
    with offload.load(packed["lossless"], context=8) as model:
        for name, parameter in model.named_parameters():
            assert (parameter.shape, parameter.dtype) == (plain[name].shape, plain[name].dtype)
            assert torch.equal(parameter + 0, plain[name])
