"""A state file of three small shards, and steps that write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.kernels.reference import checksum
from offload.tiers.host import as_tensor
from offload.tiers.statefile import StateFile, open_state

SHARDS = {"a": 8192, "b": 4096, "c": 12288}
IDENTITY = {"model": "tiny", "optimizer": "adamw"}
STEPS = 5


def contents(name: str, generation: int) -> torch.Tensor:
    """What a shard holds after a step."""
    generator = torch.Generator().manual_seed(generation * 100 + ord(name))
    return torch.randint(0, 256, (SHARDS[name],), dtype=torch.uint8, generator=generator)


def write_step(state: StateFile, generation: int) -> None:
    """Reads every shard, checks it, and writes the next generation."""
    for name, nbytes in SHARDS.items():
        buffer = Buffer(nbytes)
        if generation:
            state.read(name, buffer.view).result()
            state.verify(name, buffer.view)
            assert torch.equal(as_tensor(buffer.view), contents(name, generation - 1))
        as_tensor(buffer.view).copy_(contents(name, generation))
        state.write(name, buffer.view, generation).result()


def check(state: StateFile) -> int:
    """Every shard is what the committed step wrote; returns the step."""
    for name, nbytes in SHARDS.items():
        buffer = Buffer(nbytes)
        state.read(name, buffer.view).result()
        state.verify(name, buffer.view)
        assert torch.equal(as_tensor(buffer.view), contents(name, state.step)), (name, state.step)
    return state.step


def opened(folder: Path, engine: Engine, **options: Any) -> StateFile:
    return open_state(folder, engine, SHARDS, IDENTITY, checksum, **{"resume": True, **options})
