"""Training on an accelerator equals the in-memory loop: the emulated one computes on the CPU, so bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from reference_loop import ReferenceLoop
from test_full import NUMBERS, B, F, check, plain

import offload

CASES = [  # model, dtype, micro-batches, clip norm
    ("llama", B, 1, 0.5), ("llama", B, 2, None), ("llama", F, 1, None), ("llama-tied", B, 3, 0.5),
    ("llama-tied", B, 1, None), ("gpt2", B, 2, 0.5), ("gpt2", F, 1, None), ("qwen3_moe", B, 3, None),
    ("mixtral", F, 1, 0.5),
]  # fmt: skip
SMALLEST = {"llama": "1MiB"}
TIERS: dict[str, dict[str, Any]] = {
    "a ring on the device": {"share": 0.0},
    "half on the device": {"share": 0.5},
    "all on the device": {"share": 1.0},
    "a ring in memory too": {"share": 0.0, "resident": 0, "resident_weights": 0.0},
    "some of each": {"share": 0.3, "resident": 0.5, "resident_weights": 0.5},
}


def accelerated(folder: Path, kind: str, dtype: torch.dtype, *, share: float, **options: Any) -> Any:
    """A trainer on the emulated device: its memory holds the ring and a share of the weights."""
    if not (folder / "model").exists():
        MODELS[kind].save(folder / "model", dtype)
    given = {"device": "emulated", "dtype": dtype, "offload_dir": folder / "state", "tokens": 48, **NUMBERS, **options}
    if "gpu_memory" not in given:
        weights = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
        with pytest.raises(offload.BudgetError) as error:
            offload.finetuning(folder / "model", gpu_memory="100KiB", **given)
        given["gpu_memory"] = least(str(error.value)) + int(share * weights)
    return offload.finetuning(folder / "model", **given)


def least(text: str) -> int:
    """What an error says would do, a little more than it prints."""
    number, unit = text.partition("Give at least ")[2].split(",")[0].split()
    return int(float(number) * {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit] * 1.01) + 4096


@pytest.mark.parametrize(("kind", "dtype", "micro_batches", "clip"), CASES)
@pytest.mark.parametrize("tier", list(TIERS))
def test_on_a_device_equals_in_memory(
    tier: str, kind: str, dtype: torch.dtype, micro_batches: int, clip: float | None, tmp_path: Path
) -> None:
    with accelerated(tmp_path, kind, dtype, max_grad_norm=clip, seed=5, **TIERS[tier]) as trainer:
        loop = ReferenceLoop(plain(tmp_path / "model", dtype), max_grad_norm=clip, seed=5, **NUMBERS)
        check(trainer, loop, micro_batches)
