"""What goes wrong half way leaves nothing open, nothing pinned and nothing in flight."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.errors import StorageError
from offload.io.backends.fake import FakeBackend
from offload.io.buffers import Buffer
from offload.io.engine import Engine
from offload.io.extents import ALIGNMENT, Extent
from offload.kernels.chosen import Kernels
from offload.runtime.timeline import Timeline
from offload.runtime.turns import Turns, run
from offload.tiers import transit
from offload.tiers.devices import CpuDevice
from offload.tiers.filling import Filling
from offload.tiers.layout import Piece, Source
from offload.tiers.sink import Sink
from offload.tiers.swap import CHUNK, swap_out
from offload.tiers.wholes import bring_wholes


def tensors(path: str, count: int = 6, elements: int = 3000) -> list[Source]:
    """Tensors that lie side by side in a file."""
    size = 4 * elements
    return [
        Source(f"t{k}", torch.float32, (elements,), (Piece(Extent(path, k * size, size), torch.float32, 0, elements),))
        for k in range(count)
    ]


def disk() -> tuple[FakeBackend, Engine, list[Source]]:
    backend = FakeBackend()
    path = backend.disk.put("file", bytes(6 * 3000 * 4))
    return backend, Engine(backend), tensors(path)


@pytest.mark.parametrize("fails", [False, True])
def test_who_brings_tensors_closes_the_files(fails: bool) -> None:
    backend, engine, sources = disk()
    for bring in (
        lambda: transit.bring([(s, lambda *_: None) for s in sources], engine, transit.buffers()),
        lambda: bring_wholes([(s, lambda _: None) for s in sources], engine),
    ):
        if fails:
            backend.disk.fail(errno.EIO, operation="read", at=3)
            with pytest.raises(StorageError):
                bring()
        else:
            bring()
        assert backend.disk.open_descriptors == 0
        backend.disk.heal()
    engine.close()


class Pinning(CpuDevice):
    """Remembers what is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[int] = []

    def register(self, buffer: Buffer) -> None:
        self.pinned.append(buffer.address)

    def unregister(self, buffer: Buffer) -> None:
        assert buffer.view.nbytes, "unpinned before its memory goes"
        self.pinned.remove(buffer.address)


def test_a_load_that_fails_unpins_what_it_passed_through() -> None:
    backend, engine, sources = disk()
    device = Pinning()
    filling = Filling(engine, device, Kernels("cpu", exact=True), engine.open)
    for source in sources:
        filling.bring(source, torch.empty(3000), on_device=False)
    backend.disk.fail(errno.EIO, operation="read", at=2)
    with pytest.raises(StorageError):
        filling.finish(None)
    assert device.pinned == []
    engine.close()


def test_a_sink_that_cannot_begin_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without_tmpfile(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no such files here")
        return real(path, flags, mode, **more)

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageError("refused", path="x")

    monkeypatch.setattr(os, "open", without_tmpfile)
    with Engine() as engine:
        monkeypatch.setattr(engine, "open", refuse)
        with pytest.raises(StorageError, match="refused"):
            Sink(tmp_path / "file", engine, ALIGNMENT, ALIGNMENT)
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_is_not_durable_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise StorageError("fsync failed: the disk is gone", path="file", errno=errno.EIO)

    with Engine() as engine:
        monkeypatch.setattr(engine, "fsync", fail)
        with Sink(tmp_path / "file", engine, ALIGNMENT, ALIGNMENT) as sink:
            sink.append(torch.zeros(10))
            with pytest.raises(StorageError, match="the disk is gone"):
                sink.finish(bytes(ALIGNMENT))
    assert list(tmp_path.iterdir()) == []


def test_a_micro_batch_whose_thread_cannot_begin_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start, count = threading.Thread.start, itertools.count()

    def few(thread: threading.Thread) -> None:
        if next(count) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    turns, before = Turns(3), threading.active_count()
    with pytest.raises(RuntimeError, match="new thread"):
        run([turns.next] * 3, turns)
    assert threading.active_count() == before


def test_a_trace_that_cannot_be_written_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        Timeline().write_chrome_trace(tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


def test_what_is_swapped_out_is_cut_at_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.tiers.swap.CHUNK", ALIGNMENT)
    assert CHUNK > ALIGNMENT
    numbers = torch.Generator().manual_seed(0)
    lengths = [1, 0, 5000, 1024, 3, 4096, 0, 2, 9000]
    held = {f"t{k}": torch.randn(n, generator=numbers) for k, n in enumerate(lengths)}
    with Engine() as engine:
        sources, file = swap_out(held, tmp_path, engine)
        whole = Buffer(file.current_nbytes())
        engine.read(file, 0, whole.view, need=file.current_nbytes()).result()
        for name, tensor in held.items():
            extent = sources[name].pieces[0].extent
            raw = bytes(whole.view[extent.offset : extent.end])
            assert raw == tensor.numpy().tobytes(), name
