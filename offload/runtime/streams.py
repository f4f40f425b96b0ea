"""A model's stored weights in training: what stays in memory is bound for good, the rest while its unit is visited.

The store, the lanes and the ring are those of inference. What differs is who enters a unit: here it is the one who runs
micro-batches through it, once for all of them; and the order of visits may be there and back, as a backward pass goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from offload.io.buffers import Lease
from offload.io.engine import Engine
from offload.kernels.chosen import Kernels
from offload.planner.placement import Placement, Tier
from offload.planner.schedule import Schedule, emit
from offload.runtime.binding import Binder
from offload.runtime.discovery import Anatomy
from offload.runtime.executor import Executor, ExecutorStatistics
from offload.runtime.packed import Packed
from offload.runtime.timeline import Timeline
from offload.tiers.device import Device
from offload.tiers.devices import CpuDevice
from offload.tiers.layout import Source
from offload.tiers.store import Store

LOOSE = "(loose)"


@dataclass(frozen=True, kw_only=True)
class Whereabouts:
    """Where weights are, in bytes.

    Attributes:
        resident_nbytes: of those that stay in main memory.
        device_nbytes: of those that stay on the accelerator.
        streamed_nbytes: of those that are read when they are used.
        step_nbytes: read in a step.
        ring_slots, ring_nbytes: what they pass through.
        beside_nbytes: of copies that a step makes of some.
    """

    resident_nbytes: int
    streamed_nbytes: int
    step_nbytes: int
    ring_slots: int
    ring_nbytes: int
    device_nbytes: int = 0
    beside_nbytes: int = 0


class Streams:
    """The weights in `sources`, where `placement` says. Parameters of the model that are not among them are let be.

    Args:
        anatomy: the model's units.
        sources: where each tensor is stored.
        placement: where each of them shall live.
        engine: reads files; its owner closes it.
        kernels: what unpacks.
        present: makes, of a stored tensor that something touches outside a visit, its present value.
        device: what weights are brought to; None: main memory.
        computes_on: where the model computes, if its owner takes weights there itself; None: where they are brought.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        sources: Mapping[str, Source],
        placement: Placement,
        engine: Engine,
        kernels: Kernels,
        present: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor,
        device: Device | None = None,
        computes_on: torch.device | None = None,
    ) -> None:
        self.placement, self._kernels, self._present = placement, kernels, present
        names = {u.name: [n for n in u.tensors if n in sources] for u in anatomy.units}
        names[LOOSE] = [n for n in anatomy.loose if n in sources]
        self.names = tuple(n for ns in names.values() for n in ns)
        self._sizes = {u: sum(sources[n].nbytes for n in ns) for u, ns in names.items()}
        device = device or CpuDevice()
        self._where = computes_on or device.torch_device
        self.store = Store(engine, sources, names, placement, device, kernels)
        like = {n: torch.empty(sources[n].shape, dtype=sources[n].dtype, device="meta") for n in self.names}
        faces = {n: partial(self._face, n) for n, s in self.store.sources.items() if s.form is not None}
        owners = {n: anatomy.owners[n] for n in self.names}
        self._binder = Binder(owners, like, self._where, self, faces)
        self._executor: Executor | None = None
        self._lease: Lease | None = None
        self._order = [u.name for u in anatomy.units if self.travels(u.name)]

    def fill(self) -> None:
        """Reads what stays."""
        self.store.fill()

    def start(self, timeline: Timeline) -> None:
        """Binds what stays, which has been read, and lets the lanes run ahead.

        Args:
            timeline: receives reads and stalls.
        """
        self._binder.unbind(self.names)
        self._binder.bind({n: t for n in self.names if (t := self.store.resident(n)) is not None})
        if self._order:
            self._executor = Executor(self._order, self._emit, self.store, timeline, counts_compute=False)

    def travels(self, unit: str) -> bool:
        """Whether some weights of a unit are not there between visits."""
        return unit in self.placement.bundles

    @property
    def travelling(self) -> tuple[str, ...]:
        """The units that have such weights."""
        return tuple(self._order)

    def bundle(self, unit: str) -> tuple[str, ...]:
        """The weights of a unit that travel."""
        return tuple(t.name for t in self.placement.bundles.get(unit, ()))

    def follow(self, visits: Sequence[str]) -> None:
        """The next pass visits units in this order."""
        if self._executor is not None:
            self._executor.follow([unit for unit in visits if self.travels(unit)])

    def pause(self) -> None:
        """Stops the lanes until `follow`; what they have read ahead is read again then."""
        if self._executor is not None:
            self._executor.pause()

    def enter(self, unit: str) -> Mapping[str, torch.Tensor]:
        """Waits for the weights of a unit that travel, and binds them; returns them.

        Raises:
            StorageError: they could not be read.
        """
        if self._executor is None or not self.travels(unit):
            return {}
        self._lease = self._executor.enter(unit)
        assert self._lease is not None
        bring = self.store.device_tensors if self.store.device.has_memory else self.store.host_tensors
        tensors = bring(unit, self._lease.index)
        self._binder.bind(tensors)
        return tensors

    def leave(self, unit: str) -> None:
        """The unit's slot goes back."""
        if self._executor is not None and self.travels(unit):
            self._binder.unbind(self.bundle(unit))
            self._lease = None
            self._executor.leave()

    def whereabouts(self, visits: Sequence[str]) -> Whereabouts:
        """Bytes by place.

        Args:
            visits: the units of a step, in order.
        """
        ring, home = self.placement.host_ring, self.placement.home
        sources = self.store.sources
        reads = {
            u: sum(sources[n].read_nbytes for n in self.bundle(u) if home[n] is Tier.DISK) for u in self._order
        }  # fmt: skip
        return Whereabouts(
            resident_nbytes=self.store.resident_nbytes(Tier.HOST),
            device_nbytes=self.store.resident_nbytes(Tier.DEVICE),
            streamed_nbytes=sum(reads.values()),
            step_nbytes=sum(reads.get(unit, 0) for unit in visits),
            ring_slots=ring.slots,
            ring_nbytes=ring.nbytes,
        )

    def statistics(self) -> ExecutorStatistics:
        """Visits, passes and restarts so far."""
        return self._executor.statistics() if self._executor is not None else ExecutorStatistics(0, 0, 0)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Makes `tensors` the model's parameters of those names; the same objects every time."""
        self._binder.bind(tensors)

    @property
    def slot(self) -> memoryview:
        """The bytes of the slot that the visited unit lies in."""
        assert self._lease is not None
        return self._lease.view

    def close(self) -> None:
        """Stops the lanes and gives memory back. The model's parameters are errors from now on."""
        if self._executor is not None:
            self._executor.close()
        self._binder.unbind(self.names)
        self._binder.clear()
        self.store.close()

    # What absent parameters ask for.

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """See `Fetcher`."""
        return self.store.rows(name, ids)

    def whole(self, name: str) -> torch.Tensor:
        """See `Fetcher`."""
        return self.value(name).to(self._where)

    def value(self, name: str) -> torch.Tensor:
        """A copy of a weight as it is now, where weights are brought to."""
        return self._present(name, self.store.whole(name))

    def _emit(self, order: Sequence[str]) -> Schedule:
        return emit([(unit, self._sizes[unit]) for unit in order], self.placement)

    def _face(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a module sees of a matrix that is stored packed."""
        source = self.store.sources[name]
        assert source.form is not None
        return Packed(source.form.view(tensor), self._kernels, source.shape, source.dtype, self._where)
