"""What a run is, drawn at random: model, method, optimizer and rows; where things are in a part of it; and faults."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from test_device import least

import offload
from offload.kernels.chosen import Kernels
from offload.optim import OPTIMIZERS, make

STEPS = 6
KINDS = ("llama", "llama-tied", "gpt2", "qwen3", "qwen3_moe", "mixtral", "gemma3", "phi3", "olmo2", "bloom", "opt")
ADAPTED = ("llama", "llama-tied", "gpt_neox", "qwen3_moe", "mixtral")
CALLS = ("write", "fsync", "rename", "pwritev", "preadv", "posix_fallocate")
Batches = list[dict[str, torch.Tensor]]


@dataclass(kw_only=True)
class Draw:
    """What stays the same over all parts of a run."""

    kind: str
    dtype: torch.dtype
    method: str
    options: dict[str, Any]
    steps: list[Batches]
    shard_count: int | None = None
    held_out: Batches = field(default_factory=list)


def rows(rng: random.Random, count: int) -> Batches:
    """Micro-batches of several widths, some of whose labels are masked."""
    found = []
    for _ in range(count):
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        shape = (rng.randint(1, 3), rng.choice((2, 7, 16, 24)))
        ids = torch.randint(3, 320, shape, generator=generator)
        labels = ids.clone()
        labels[0, : rng.randrange(shape[1])] = -100
        if rng.random() < 0.1 and found:
            labels[:] = -100  # nothing to learn here
        found.append({"input_ids": ids, "labels": labels})
    if all((b["labels"][:, 1:] == -100).all() for b in found):
        found[0]["labels"] = found[0]["input_ids"].clone()
    return found


def draw(rng: random.Random) -> Draw:
    method = rng.choices(("full", "lora", "zo"), (6, 2, 2))[0]
    options: dict[str, Any] = {"method": method, "seed": rng.randrange(100), "learning_rate": 1e-2}
    found = Draw(
        kind=rng.choice(KINDS if method == "full" else ADAPTED if method == "lora" else KINDS[:6]),
        dtype=rng.choice((torch.bfloat16, torch.float32)),
        method=method,
        options=options,
        steps=[rows(rng, rng.choice((1, 1, 2, 3))) for _ in range(STEPS)],
        held_out=rows(rng, rng.choice((1, 2, 18))),
    )
    if method == "zo":
        options |= {"zo_eps": 1e-2, "zo_sparsity": rng.choice((0.0, 0.75))}
        return found
    options |= {"max_grad_norm": rng.choice((None, 0.5, 0.01, 1e9)), "weight_decay": rng.choice((0.0, 0.1))}
    options["optimizer"] = rng.choice(("adamw", "adamw", "adamw", *OPTIMIZERS))
    if method == "lora":
        options["lora"] = {"r": rng.choice((1, 4, 8)), "lora_alpha": 8, "lora_dropout": rng.choice((0.0, 0.1))}
    elif not make(options["optimizer"], Kernels("cpu", exact=False)).whole_rows:
        found.shard_count = rng.choice((None, 4096, 16384))
    return found


def rings(rng: random.Random, drawn: Draw) -> dict[str, Any]:
    """Of one part of a run: how deep the ring of state is, and which share of it is written in the backward pass."""
    if drawn.method != "full":
        return {}
    choice: dict[str, Any] = {"slots": rng.choice((1, 2, 3, 8, 40))}
    found: dict[str, Any] = {"choice": choice}
    if drawn.shard_count is not None:
        found["shard_count"] = drawn.shard_count
    if drawn.options["max_grad_norm"] is not None:
        choice["defers"] = rng.choice((0.0, 0.0, 0.3, 0.6, 1.0))
    return found


def places(rng: random.Random, drawn: Draw, folder: Path) -> dict[str, Any]:
    """Of one part of a run: where things are, and what computes."""
    share = lambda: rng.choice((None, 0, 0.3, 0.6, 1.0))  # noqa: E731
    found: dict[str, Any] = {"tokens": 72, "resident_weights": share()}
    if drawn.method != "zo":
        found["resident"] = share()
        found["activations"] = rng.choice(("auto", "keep", "recompute", "disk"))
    else:
        found["zo_write_every"] = rng.choice((None, 1, 2, 100))
    if rng.random() < 0.5:
        return found
    found |= {"device": "emulated", "overlap": rng.random() < 0.8}
    if found.get("activations") == "keep" and drawn.method == "lora":
        found["activations"] = "auto"
    if drawn.method == "full" and drawn.options["optimizer"] == "adamw":
        found["update_share"] = rng.choice((0.0, 0.3, 0.7, 1.0, "auto"))
    options = {"dtype": drawn.dtype, "offload_dir": folder / "none", "gpu_memory": "1KiB", **drawn.options, **found}
    with pytest.raises(offload.BudgetError) as error:
        offload.finetuning(folder / "model", **options)
    weights = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    found["gpu_memory"] = least(str(error.value)) + int(rng.choice((0.0, 0.2, 0.5, 2.0)) * weights)
    return found


def fault(rng: random.Random) -> tuple[str, contextlib.AbstractContextManager[None]]:
    """A system call that touches files, and fails once or from then on; and what it is, in words."""
    name, at, is_lasting = rng.choice(CALLS), int(2 ** rng.uniform(0, 9)), rng.random() < 0.5
    number = rng.choice((errno.EIO, errno.ENOSPC))
    return f"{name} fails at {at}, {is_lasting=}, {errno.errorcode[number]}", _failing(name, at, number, is_lasting)


@contextlib.contextmanager
def _failing(name: str, at: int, number: int, is_lasting: bool) -> Iterator[None]:
    true, left = getattr(os, name), at

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 or (left < 0 and is_lasting):
            raise OSError(number, os.strerror(number))
        return true(*args, **kwargs)

    setattr(os, name, call)
    try:
        yield
    finally:
        setattr(os, name, true)
