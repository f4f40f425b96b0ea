"""Puts a trainer of adapters together: frozen weights in memory as far as they fit, the rest streaming twice a step."""

from __future__ import annotations

from math import prod
from typing import Any

from offload.checkpoint import Opened
from offload.checkpoint.fingerprint import fingerprint
from offload.finetune.assemble import SLOTS, assemble
from offload.finetune.lora import A, B, Lora, adapt, begin, save_adapters
from offload.finetune.room import backward_nbytes, place_beside, spec_of
from offload.finetune.trainer import Trainer
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.optim.base import Optimizer
from offload.runtime.discovery import dissect
from offload.runtime.linears import unpack_nbytes
from offload.runtime.streams import Streams
from offload.runtime.warmup import compile_kernels
from offload.specs import Budgets
from offload.tiers.cells import SHARD_COUNT


def assemble_lora(
    opened: Opened,
    lora: Lora,
    rule: Optimizer,
    engine: Engine,
    kernels: Kernels,
    *,
    budgets: Budgets,
    tokens: int,
    seed: int,
    **options: Any,
) -> Trainer:
    """A trainer of adapters. The checkpoint's weights stay as they are, packed ones too.

    Args:
        budgets: for the process, and for the frozen weights.
        tokens: of a micro-batch.
        options: as for `assemble.assemble`.
    """
    root, sources = opened.model, opened.sources
    targets = adapt(root, lora)
    anatomy = dissect(root, shares=False)
    shapes = {n: (p.dtype, tuple(p.shape)) for n, p in root.named_parameters() if n.rpartition(".")[2] in (A, B)}
    compile_kernels(kernels, sources.values())
    spec = spec_of(anatomy, sources, getattr(root, "config", None), by_rows=True)
    count = sum(prod(shape) for _, shape in shapes.values())
    state = rule.state_nbytes((min(count, SLOTS * SHARD_COUNT),))
    beside = backward_nbytes(spec, tokens) | {
        "adapters and the ring of their state": sum(d.itemsize * prod(s) for d, s in shapes.values()) + state,
        "weights as they are unpacked": 2 * unpack_nbytes(sources.values(), exact=True),
    }
    streams = Streams(anatomy, sources, place_beside(spec, budgets, tokens, beside), engine, kernels)
    try:
        streams.fill()
        return assemble(
            root, anatomy, shapes, rule, engine, kernels,
            fill=lambda views: begin(views, seed), streams=streams, travels=False,
            save=lambda views, folder: save_adapters(root, lora, targets, views, folder, engine),
            seed=seed, cpu_memory=budgets.cpu_memory, **options,
            belongs={"adapters": lora.adds, "checkpoint": fingerprint(opened.checkpoint)},
        )  # fmt: skip
    except BaseException:
        streams.close()
        raise
