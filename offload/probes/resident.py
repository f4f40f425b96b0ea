"""Runs a module under a session with all its weights in memory, as a model that fits runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from offload.checkpoint.describe import describe
from offload.io.engine import Engine
from offload.io.extents import Extent
from offload.kernels.chosen import Kernels
from offload.planner.placement import place
from offload.runtime.discovery import dissect
from offload.runtime.session import Session
from offload.tiers.devices import create
from offload.tiers.layout import Piece, Source

_ENDLESS = 1 << 60


@contextmanager
def resident(module: nn.Module, *, exact: bool = False) -> Iterator[Session]:
    """A session of the module on the CPU; its parameters are back in their places afterwards."""
    anatomy = dissect(module)
    places = [(o.module, o.attribute, o.module._parameters[o.attribute]) for os in anatomy.owners.values() for o in os]
    given = {n: p for n, o in anatomy.owners.items() if (p := o[0].module._parameters[o[0].attribute]) is not None}
    sources = {
        n: Source(
            n, p.dtype, tuple(p.shape), (Piece(Extent("", 0, p.numel() * p.element_size()), p.dtype, 0, p.numel()),)
        )
        for n, p in given.items()
    }
    placement = place(describe(anatomy, sources), host_nbytes=_ENDLESS)
    kernels = Kernels("cpu", exact=exact)
    session = Session(module, anatomy, sources, placement, Engine(), create("cpu"), given, kernels=kernels)
    try:
        session.start()
        yield session
    finally:
        session.close()
        for owner, attribute, parameter in places:
            owner._parameters[attribute] = parameter
