"""One world per backend, and engines on fake disks; both check at the end that nothing was lost or left open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from io_worlds import PAGE, World, open_descriptors

from offload.io.backends import BACKENDS, probe
from offload.io.backends.fake import FakeBackend
from offload.io.engine import Engine


@pytest.fixture(params=list(BACKENDS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    reason = probe(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    before = open_descriptors()
    found = World(request.param, tmp_path)
    yield found
    found.finish()
    if found.name != "fake":
        assert open_descriptors() <= before, "descriptors leak"


@pytest.fixture
def fake() -> Iterator[Callable[..., tuple[Engine, FakeBackend]]]:
    """Makes an engine on a fake disk of its own, checked and closed at the end."""
    made: list[tuple[Engine, FakeBackend]] = []

    def make(threads: int = 4, **options: Any) -> tuple[Engine, FakeBackend]:
        backend = FakeBackend(threads)
        engine = Engine(backend, threads=threads, **{"block_nbytes": PAGE, **options})
        made.append((engine, backend))
        return engine, backend

    yield make
    for engine, backend in made:
        backend.release()
        engine.check_integrity()
        engine.close()
        engine.check_integrity()
        assert engine.statistics().in_flight == 0
        assert backend.disk.open_descriptors == 0
