"""Files, engines and memory for one backend: the same test body runs on real files and on the fake disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from offload.io.buffers import Buffer
from offload.io.engine import Engine

PAGE = 4096


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes in which every 4-byte word of a file differs from its neighbours, so that misplaced blocks show."""
    words = ((i * 2654435761 + seed * 40503) & 0xFFFFFFFF for i in range(nbytes // 4 + 1))
    return b"".join(word.to_bytes(4, "little") for word in words)[:nbytes]


class World:
    """Makes files and engines for one backend, and checks at the end that nothing was lost or left open."""

    def __init__(self, name: str, root: Path) -> None:
        self.name, self.root = name, root
        self.engines: list[Engine] = []
        self.buffers: list[Buffer] = []

    @property
    def is_fake(self) -> bool:
        return self.name == "fake"

    def engine(self, **options: Any) -> Engine:
        engine = Engine(self.name, **{"threads": 4, **options})
        self.engines.append(engine)
        return engine

    def put(self, engine: Engine, contents: bytes, name: str = "file") -> str:
        if self.is_fake:
            return engine.backend.disk.put(self.root / name, contents)
        path = self.root / name
        path.unlink(missing_ok=True)
        path.write_bytes(contents)
        return str(path)

    def get(self, engine: Engine, path: str) -> bytes:
        return engine.backend.disk.get(path) if self.is_fake else Path(path).read_bytes()

    def remove(self, engine: Engine, path: str) -> None:
        engine.backend.disk.remove(path) if self.is_fake else os.unlink(path)

    def truncate(self, engine: Engine, path: str, nbytes: int) -> None:
        engine.backend.disk.truncate(path, nbytes) if self.is_fake else os.truncate(path, nbytes)

    def buffer(self, nbytes: int, fill: int = 0xEE) -> memoryview:
        buffer = Buffer(nbytes)
        self.buffers.append(buffer)
        buffer.view[:] = bytes([fill]) * nbytes
        return buffer.view

    def finish(self) -> None:
        for engine in self.engines:
            engine.check_integrity()
            engine.close()
            engine.check_integrity()
            assert engine.statistics().in_flight == 0
            if self.is_fake:
                assert engine.backend.disk.open_descriptors == 0
        for buffer in self.buffers:
            buffer.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def memory(nbytes: int, fill: int = 0xEE) -> memoryview:
    """A page-aligned view that owns its memory."""
    view = Buffer(nbytes).view
    view[:] = bytes([fill]) * nbytes
    return view
