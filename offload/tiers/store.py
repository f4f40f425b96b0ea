"""Every tensor of a model by name: where it lives, and how to bring it to where the model computes.

Owns all memory that weights occupy: the arena of what stays in main memory, the ring of host slots, and on a device
with memory of its own the same two again. Moves whole bundles (`bundle_reads.py`) and fills what stays (`filling.py`);
knows nothing of the order in which they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from math import prod

import torch

from offload.io.buffers import Buffer, BufferPool, Lease
from offload.io.engine import Engine, File
from offload.io.extents import ALIGNMENT, Extent
from offload.kernels.chosen import Kernels
from offload.kernels.formats.form import take_rows
from offload.planner.placement import Placement, Tier
from offload.tiers.bundle_reads import read_bundle
from offload.tiers.device import Device, Event
from offload.tiers.filling import Filling, Progress
from offload.tiers.host import HostArena, as_bytes, as_tensor
from offload.tiers.layout import Layout, Piece, Source, View, lay_out, view_of
from offload.tiers.rows import URGENT, read_packed_rows, read_rows
from offload.tiers.slots import VIEW_ALIGNMENT
from offload.tiers.staging import ReadOp, Target

DEVICE_ALIGNMENT = 512

Tensors = dict[str, torch.Tensor]


class Store:
    """The tensors of one model. A packed one (Source.form) is its run of bytes wherever tensors are handed out.

    Args:
        engine: reads files. The store does not close it.
        sources: every tensor, by name, and where it is stored.
        units: unit name -> the tensors that belong to it.
        placement: where they shall live.
        device: where the model computes.
        kernels: what packs and unpacks.
        given: tensors that are in main memory already; those that stay there are used as they are.
        files: files that are open already, by path.
        before: the store of the same tensors that this one replaces, on a device without memory of its own. What stays
            in main memory under both, packed in both or in none, is not read again; its memory is this store's once
            `before` is closed, which must be before `fill`.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Mapping[str, Source],
        units: Mapping[str, Sequence[str]],
        placement: Placement,
        device: Device,
        kernels: Kernels,
        given: Mapping[str, torch.Tensor] | None = None,
        files: Mapping[str, File] | None = None,
        before: Store | None = None,
    ) -> None:
        home = placement.home
        self.engine, self.placement, self.device, self._kernels = engine, placement, device, kernels
        self.sources = {n: s.unpacked if home.get(n) is Tier.DISK else s for n, s in sources.items()}
        self.fallbacks: list[str] = []
        self.weight_errors: dict[str, float] = {}
        self._files: dict[str, File] = dict(files or {})
        self._given = dict(given or {})
        self._left: Tensors | None = None  # to the store that replaces this one
        self._older: list[HostArena] = []
        if before is not None:
            alike = {n for n, s in self.sources.items() if (s.form is None) == (before.sources[n].form is None)}
            self._given |= before._leave(alike & placement.names(Tier.HOST) - set(self._given))
            self.sources |= {n: before.sources[n] for n in before._left or ()}
            self._older = [*before._older, before.arena]
        sources = self.sources
        self._resident: Tensors = {n: t for n, t in self._given.items() if home[n] is Tier.HOST}
        read = [(u, [n for n in ns if home[n] is Tier.HOST and n not in self._given]) for u, ns in units.items()]
        self._kept = {u: lay_out([sources[n] for n in ns]) for u, ns in read}
        self._on_device = [n for ns in units.values() for n in ns if home[n] is Tier.DEVICE]
        self._bundles = {u: [t.name for t in ts] for u, ts in placement.bundles.items()}
        self._reads = {u: lay_out([sources[n] for n in ns if home[n] is Tier.DISK]) for u, ns in self._bundles.items()}
        self._uploads = {u: self._device_layout(ns) for u, ns in self._bundles.items()} if device.has_memory else {}

        self.arena = HostArena(sum(_page(k.final_nbytes) for k in self._kept.values()))
        read_nbytes = max((r.nbytes for r in self._reads.values()), default=0)
        self.host_ring = BufferPool(max(1, placement.host_ring.slots), read_nbytes)
        slots = placement.device_ring.slots
        slot_nbytes = _page(max((size for _, size in self._uploads.values()), default=0))
        self.device_ring = BufferPool(max(1, slots), 0)  # lends indices; the memory is the device's
        kept = self._device_layout(self._on_device)
        self._device_kept = kept[0]
        self._device_arena = torch.empty(0, dtype=torch.uint8)
        self._device_slots: list[torch.Tensor] = []
        if device.has_memory:
            memory = device.allocate(_page(kept[1]) + slots * slot_nbytes)
            self._device_arena = memory[: kept[1]]
            start = _page(kept[1])
            self._device_slots = [memory[start + k * slot_nbytes :][:slot_nbytes] for k in range(slots)]
            for buffer in (self.arena.buffer, self.host_ring.buffer):
                if (reason := device.register(buffer)) is not None:
                    self.fallbacks.append(reason)
        self._slot_bytes = [as_tensor(s) for s in _slots_of(self.host_ring)]
        self._bound: dict[tuple[str, int, int], Tensors] = {}

    # What stays: read once, before the first step.

    def fill_nbytes(self) -> int:
        """Bytes that `fill` reads from disk."""
        return sum(k.read_nbytes for k in self._kept.values()) + sum(
            lay_out([self.sources[n]]).read_nbytes for n in self._on_device if n not in self._given
        )

    def fill(self, progress: Progress | None = None, meanwhile: Callable[[], None] | None = None) -> None:
        """Reads everything that stays in memory, at the disk's rate.

        Args:
            progress: called with bytes as they arrive.
            meanwhile: called once while the disk is busy.
        """
        filling = Filling(self.engine, self.device, self._kernels, self.open)
        for layout in self._kept.values():
            view = self.arena.take(layout.final_nbytes)
            area = as_tensor(view)
            for name, place in layout.views.items():
                target = self._resident[name] = place.of(area)
                if layout.copies and not self.sources[name].is_plain:
                    filling.bring(self.sources[name], target, on_device=False)
            filling.read(layout, view)
        if meanwhile is not None:
            meanwhile()
        filling.wait(progress)
        for name in self._on_device:
            target = self._resident[name] = self._device_kept[name].of(self._device_arena)
            if name in self._given:
                self.device.upload([(as_bytes(target), as_bytes(self._given.pop(name)))], None).wait()
            else:
                filling.bring(self.sources[name], target, on_device=True)
        filling.finish(progress)
        if self.device.torch_device.type == "cpu":  # its slots are fresh pages, which the first upload would wait for
            for slot in self._device_slots:
                slot[::ALIGNMENT].zero_()
        for name, (form, error) in filling.packed.items():
            self.sources[name], self.weight_errors[name] = replace(self.sources[name], form=form), error

    # What travels in every pass.

    def read(self, unit: str, lease: Lease) -> Future[int]:
        """Starts reading the unit's part on disk into a host slot; done when its tensors can be used."""
        return read_bundle(self._reads[unit], lease.view, self.engine, self.open)

    def upload(self, unit: str, host_slot: int | None, device_slot: int, after: Event | None) -> Event:
        """Copies the unit's bundle to a device slot, from the host slot it was read to and from the arena."""
        places, _ = self._uploads[unit]
        slot = self._device_slots[device_slot]
        below = self.host_tensors(unit, host_slot) if host_slot is not None else {}
        pairs = []
        for name, place in places.items():
            source = below[name] if name in below else self._resident[name]
            pairs.append((as_bytes(place.of(slot)), as_bytes(source)))
        return self.device.upload(pairs, after)

    def host_tensors(self, unit: str, slot: int) -> Tensors:
        """The tensors of a unit that were read to a host slot. The same objects every time."""
        return self._views(unit, 0, slot, self._reads[unit].views, self._slot_bytes)

    def device_tensors(self, unit: str, slot: int) -> Tensors:
        """The tensors of a unit that were uploaded to a device slot. The same objects every time."""
        return self._views(unit, 1, slot, self._uploads[unit][0], self._device_slots)

    # Bundles that are stored anew.

    def image_nbytes(self, unit: str) -> int:
        """Bytes of a slot that hold the unit's part on disk once it has arrived: a multiple of 4096."""
        return self._reads[unit].final_nbytes

    def places(self, unit: str) -> dict[str, int]:
        """Where each tensor of that part begins in a slot."""
        return {name: view.at for name, view in self._reads[unit].views.items()}

    def reread(self, unit: str, file: File, offset: int) -> None:
        """The unit's part on disk is an image of its slot from now on. No lane may be reading."""
        layout = self._reads[unit]
        nbytes = layout.final_nbytes
        read = ReadOp(file.path, offset, nbytes, (Target(0, nbytes, False),), True)
        self._reads[unit] = Layout(nbytes, 0, (read,), (), layout.views)
        for name, view in layout.views.items():
            source = self.sources[name]
            piece = Piece(Extent(file.path, offset + view.at, view.nbytes), source.dtype, 0, prod(source.shape))
            self.sources[name] = replace(source, pieces=(piece,))
        self._files[file.path] = file

    def forget(self, path: str) -> None:
        """Closes a file that nothing is read from any more."""
        file = self._files.pop(path, None)
        if file is not None:
            file.close()

    # Single tensors.

    def resident(self, name: str) -> torch.Tensor | None:
        """A tensor that stays where the model computes, or None when it travels."""
        home = self.placement.home[name]
        if home is Tier.DEVICE or (home is Tier.HOST and not self.device.has_memory):
            return self._resident[name]
        return None

    def kept(self, name: str) -> torch.Tensor:
        """A tensor that stays, on whichever tier."""
        return self._resident[name]

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows of a two-dimensional tensor that is not where the model computes, unpacked; only they are read.

        Args:
            ids: 1-D, sorted, unique.

        Raises:
            IndexError: a row that does not exist.
        """
        source = self.sources[name]
        wanted = ids.tolist()
        if wanted and not 0 <= wanted[0] <= wanted[-1] < source.shape[0]:
            raise IndexError(f"{name} has rows 0 to {source.shape[0] - 1}; {wanted[0]} to {wanted[-1]} were asked for")
        if source.form is not None:
            weight = (
                take_rows(source.form.view(self._resident[name]), ids.to("cpu"))
                if name in self._resident
                else read_packed_rows(source, wanted, self.engine, self.open)
            )
            return self._kernels.unpack(weight, source.dtype).to(self.device.torch_device)
        if name in self._resident:
            return self._resident[name].index_select(0, ids.to("cpu")).to(self.device.torch_device)
        if len(source.pieces) != 1:
            return self.whole(name).index_select(0, ids.to(self.device.torch_device))
        return read_rows(source, wanted, self.engine, self.open).to(self.device.torch_device)

    def whole(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """A copy of the tensor where the model computes (or on another device), wherever it lives; unpacked."""
        device = device or self.device.torch_device
        source = self.sources[name]
        if name in self._resident:
            found = self._resident[name]
        else:
            layout = lay_out([source])
            buffer = Buffer(layout.nbytes)
            read_bundle(layout, buffer.view, self.engine, self.open, URGENT).result()
            found = layout.views[name].of(as_tensor(buffer.view))
        if source.form is not None:
            return self._kernels.unpack(source.form.view(found), source.dtype).to(device)
        return found.to(device)

    def resident_nbytes(self, tier: Tier) -> int:
        """Bytes of weights that stay on a tier."""
        return sum(self.sources[n].nbytes for n in self._resident if self.placement.home[n] is tier)

    def check_integrity(self) -> None:
        """Every slot is free or lent."""
        self.host_ring.check_integrity()
        self.device_ring.check_integrity()

    def _leave(self, names: Iterable[str]) -> Tensors:
        """The tensors of these names that are here, which closing does not take from whoever asked."""
        assert not self.device.has_memory, "what a device needs pinned cannot change hands"
        self._left = {n: self._resident[n] for n in names if n in self._resident}
        return self._left

    def close(self) -> None:
        """Gives all memory back but that of tensors which another store has taken over. Nothing may be in flight."""
        self.device.synchronize()
        self._resident.clear()
        self._bound.clear()
        self._slot_bytes.clear()
        self._device_slots.clear()
        self._device_arena = torch.empty(0, dtype=torch.uint8)
        self.device.close()  # unpins before the memory goes
        for arena in (*self._older, self.arena):
            if not arena.keep((self._left or {}).values()):
                arena.close()
        self._older, self._left = [], None
        self.host_ring.close()
        self.device_ring.close()

    def open(self, path: str) -> File:
        """The open file of that name; opened at first use, closed with the engine."""
        if path not in self._files:
            self._files[path] = self.engine.open(path)
        return self._files[path]

    def _views(
        self, unit: str, ring: int, slot: int, places: Mapping[str, View], areas: Sequence[torch.Tensor]
    ) -> Tensors:
        key = (unit, ring, slot)
        if key not in self._bound:
            self._bound[key] = {name: place.of(areas[slot]) for name, place in places.items()}
        return self._bound[key]

    def _device_layout(self, names: Iterable[str]) -> tuple[dict[str, View], int]:
        """Places for tensors in device memory, and the bytes they take."""
        places, end = {}, 0
        for name in names:
            source = self.sources[name]
            end = -(-end // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
            if self.device.keeps_alignment and source.is_plain:
                end += source.pieces[0].extent.offset % VIEW_ALIGNMENT
            places[name] = view_of(source, end)
            end += source.nbytes
        return places, end


def _page(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _slots_of(pool: BufferPool) -> list[memoryview]:
    """A view of every slot of a pool, by index."""
    size = pool.statistics().slot_nbytes
    return [pool.buffer.view[at : at + size] for at in range(0, pool.buffer.nbytes, max(1, size))]
