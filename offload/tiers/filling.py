"""Reads what stays in memory to where it stays, at the disk's rate: as it is, cast, or packed on the way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from offload.io.buffers import Buffer
from offload.io.engine import Engine, File
from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import Form, Weight
from offload.tiers import transit
from offload.tiers.bundle_reads import read_bundle
from offload.tiers.device import Device
from offload.tiers.host import Scratch, as_bytes
from offload.tiers.layout import Layout, Source
from offload.tiers.packing import pack_to
from offload.tiers.transit import Put, copy_to

Progress = Callable[[int], None]


class Filling:
    """One load of a model: `read` and `bring` say what, `wait` and `finish` see it through.

    Args:
        engine: reads files.
        device: where `on_device` tensors go.
        kernels: what packs.
        opened: gives the open file of a path.

    Attributes:
        packed: of every matrix that was packed, after `finish`: what its form has become, and its error.
    """

    def __init__(self, engine: Engine, device: Device, kernels: Kernels, opened: Callable[[str], File]) -> None:
        self._engine, self._device, self._kernels, self._opened = engine, device, kernels, opened
        self._reads: list[Future[int]] = []
        self._jobs: list[tuple[Source, Put]] = []
        self._scratch = Scratch()
        self._staging: dict[Future[int], Buffer] = {}  # of reads that nobody has waited for
        self.packed: dict[str, tuple[Form, float]] = {}

    def read(self, layout: Layout, view: memoryview) -> None:
        """Starts reading what the disk has as it shall be, straight to its place: all of a layout that copies no more
        than ends of pieces, else what is plain in it.
        """
        if not layout.copies:
            staging = Buffer(layout.staging_nbytes)
            future = read_bundle(layout, view, self._engine, self._opened, staging=staging.view)
            self._staging[future] = staging
            self._reads.append(future)
            return
        for op in layout.reads:
            if op.is_plain:
                parts = [view[to.at : to.at + to.nbytes] for to in op.targets]
                self._reads.append(self._engine.read(self._opened(op.path), op.offset, parts, need=op.need))

    def bring(self, source: Source, target: torch.Tensor, *, on_device: bool) -> None:
        """Notes a tensor that `finish` will read by way of a buffer."""
        if source.is_made:
            put = self._pack_to(source, target, on_device=on_device)
        else:
            put = self._upload_to(target) if on_device else copy_to(target)
        self._jobs.append((source, put))

    def wait(self, progress: Progress | None) -> None:
        """Waits for what `read` started.

        Raises:
            StorageError: something could not be read. Nothing is in flight then.
        """
        try:
            for future in self._reads:
                done = future.result()
                self._give_back(future)
                if progress is not None:
                    progress(done)
        finally:
            for future in self._reads:
                future.exception()
                self._give_back(future)

    def _give_back(self, future: Future[int]) -> None:
        """The memory beside the places of a read that has ended."""
        staging = self._staging.pop(future, None)
        if staging is not None:
            staging.discard(0, staging.nbytes)  # at once, whoever still has a view of it
            staging.close()

    def finish(self, progress: Progress | None) -> None:
        """Reads what `bring` noted. Raises StorageError, as `wait`."""
        if not self._jobs:
            return
        pool = transit.buffers()
        self._device.register(pool.buffer)
        try:
            transit.bring(self._jobs, self._engine, pool, progress)
        finally:
            self._device.synchronize()
            self._device.unregister(pool.buffer)  # before the memory goes
            pool.close()
            self._scratch.close()

    def _upload_to(self, target: torch.Tensor) -> Put:
        flat = target.reshape(-1)

        def put(start: int, values: torch.Tensor) -> None:
            self._device.upload([(as_bytes(flat[start : start + len(values)]), as_bytes(values))], None).wait()

        return put

    def _pack_to(self, source: Source, target: torch.Tensor, *, on_device: bool) -> Put:
        """Packs a matrix into its run of bytes in memory."""

        def put(weight: Weight, form: Form, error: float) -> None:
            self.packed[source.name] = form, error
            if not on_device:
                form.write(weight, target)
            else:
                form.write(weight, run := torch.empty(form.nbytes, dtype=torch.uint8))
                self._device.upload([(target, run)], None).wait()

        return pack_to(source, self._kernels, self._scratch, put)
