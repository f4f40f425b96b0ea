"""One model under offload: its store, its executor and the hooks that let the model drive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from offload.errors import BudgetError, ClosedError, ModelError
from offload.io.engine import Engine, File
from offload.kernels.chosen import Kernels
from offload.planner.placement import Placement
from offload.planner.processors import host_part
from offload.planner.schedule import Schedule, emit
from offload.runtime import faster
from offload.runtime.apart import Apart, Crossing
from offload.runtime.binding import Binder
from offload.runtime.discovery import Anatomy, Unit
from offload.runtime.executor import Executor
from offload.runtime.packed import Packed
from offload.runtime.timeline import Timeline, Totals
from offload.tiers.cutting import cut_given, cut_sources
from offload.tiers.device import Device
from offload.tiers.layout import Source
from offload.tiers.store import Store
from offload.units import format_bytes

LOOSE = "(loose)"


@dataclass(frozen=True, kw_only=True)
class SessionStatistics:
    """Counters of a session since it started; subtract two of them to measure a stretch.

    Attributes:
        passes: whole passes through the schedule.
        read_bytes: read from disk.
        uploaded_bytes: copied to the device.
        device_peak_bytes: most device memory in use.
        totals: busy seconds, bytes and stalls by lane.
        restarts: how often the model left the schedule.
        fetched: tensors that were touched outside their unit, and how often.
    """

    passes: int
    read_bytes: int
    uploaded_bytes: int
    device_peak_bytes: int
    totals: Totals
    restarts: int
    fetched: Mapping[str, int]


class Session:
    """Runs `root` with its weights where `placement` says.

    Args:
        root: the module; its parameters are replaced while the session lives.
        anatomy: how its parameters are divided.
        sources: where each of them is stored.
        placement: where each of them shall live.
        engine: reads files; the session closes it.
        device: where the model computes; the session closes it.
        given: tensors that are in main memory already.
        files: files that are open already, by path.
        before: the session of the same model that this one replaces (see Store).
        kernels: what computes, packs and unpacks.
        host_kernels: the CPU's, for what it multiplies beside an accelerator.
        planned_tokens: of a sequence, for its keys and values; 0 when unknown.
    """

    def __init__(
        self,
        root: nn.Module,
        anatomy: Anatomy,
        sources: Mapping[str, Source],
        placement: Placement,
        engine: Engine,
        device: Device,
        given: Mapping[str, torch.Tensor] | None = None,
        files: Mapping[str, File] | None = None,
        before: Session | None = None,
        *,
        kernels: Kernels,
        host_kernels: Kernels | None = None,
        planned_tokens: int = 0,
    ) -> None:
        self.root, self.anatomy, self.placement = root, anatomy, placement
        self.engine, self.device = engine, device
        self.kernels = kernels
        self.timeline = Timeline()
        names = {u.name: u.tensors for u in anatomy.units} | {LOOSE: anatomy.loose}
        parts, names = cut_sources(sources, names, placement)
        self._sizes = {u: sum(parts[n].nbytes for n in ns) for u, ns in names.items()}
        given = cut_given(given or {}, placement)
        replaced = None if before is None else before.store
        self.store = Store(engine, parts, names, placement, device, kernels, given, files, replaced)
        like = {n: torch.empty(sources[n].shape, dtype=sources[n].dtype, device="meta") for n in anatomy.owners}
        faces = {n: partial(self._matrix, n) for n, s in self.store.sources.items() if s.form is not None}
        self._crossing = Crossing(device, host_kernels or kernels)
        faces |= {n: partial(self._apart, n) for n in placement.first_rows}
        self._binder = Binder(anatomy.owners, like, device.torch_device, self, faces)
        self._executor: Executor | None = None
        self._handles: list[RemovableHandle] = []
        self._fetched: dict[str, int] = {}
        self._bound: dict[str, torch.Tensor] = {}
        self._active: list[tuple[int, str | None]] = []  # (thread, unit) of running forwards, outermost first
        self._uninstall: Callable[[], None] = lambda: None
        self._lacks: list[str] = []
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._planned_tokens = planned_tokens
        self._is_closed = False

    def start(self) -> None:
        """Binds what stays in memory, hooks the units and lets the lanes run ahead. The store has been filled."""
        self._binder.unbind(tuple(self.anatomy.owners))
        cut = self.placement.first_rows
        kept = {n: self.store.resident(n) for n in self.anatomy.owners if n not in cut}
        kept |= {n: self.store.kept(host_part(n, 0)) for n, first in cut.items() if first == 0}
        self._binder.bind({n: t for n, t in kept.items() if t is not None})
        self._move_buffers()
        hooked = self._hooked()
        order = [u.name for u in hooked]
        self._executor = Executor(order, self._emit, self.store, self.timeline) if order else None
        for unit in hooked:
            self._hook(unit)
        has_faces = bool(cut) or any(s.form is not None for s in self.store.sources.values())
        if self.device.torch_device.type == "cpu" or has_faces:
            self._uninstall = faster.install(
                self.root, self.kernels, has_faces=has_faces, planned_tokens=self._planned_tokens, lacks=self._lacks
            )
        if self._executor is not None and all(u.module is not self.root for u in hooked):
            self._handles += [
                self.root.register_forward_pre_hook(lambda *_: self._begin_pass(), prepend=True),
                self.root.register_forward_hook(lambda *_: self._running().end_pass()),
            ]

    def _hooked(self) -> list[Unit]:
        """Units that a pass enters as a whole; tables alone are read by the row, whenever an embedding asks."""
        return [u for u in self.anatomy.units if not set(u.tensors) <= self.anatomy.tables]

    def _emit(self, order: Sequence[str]) -> Schedule:
        return emit([(name, self._sizes[name]) for name in order], self.placement)

    def _matrix(self, name: str, tensor: torch.Tensor, is_on_cpu: bool = False) -> torch.Tensor:
        """What a module sees of a tensor: itself, or what stands for the matrix whose packed bytes it is."""
        source = self.store.sources[name]
        if source.form is None:
            return tensor
        kernels = self._crossing.kernels if is_on_cpu else self.kernels
        device = torch.device("cpu") if is_on_cpu else self.device.torch_device
        return Packed(source.form.view(tensor), kernels, source.shape, source.dtype, device)

    def _apart(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a module sees of a matrix that two processors have; `tensor` is the accelerator's part, if any."""
        first = self.placement.first_rows[name]
        rest = host_part(name, first)
        here = self._matrix(name, tensor) if first else None
        return Apart(here, self._matrix(rest, self.store.kept(rest), is_on_cpu=True), self._crossing)

    def _move_buffers(self) -> None:
        """Buffers go where the model computes; a device of another kind than they are on needs copies."""
        for module in self.root.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != self.device.torch_device.type:
                    self._buffers.append((module, name, buffer))
                    module._buffers[name] = buffer.to(self.device.torch_device)

    def before_pass(self, check: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Calls `check(module, args, kwargs)` before every forward of the whole model."""
        self._handles.append(self.root.register_forward_pre_hook(check, with_kwargs=True, prepend=True))

    @property
    def schedule(self) -> Schedule:
        """The steps of one pass, as they run now or, before the start, as they would."""
        return self._executor.schedule if self._executor is not None else self._emit([u.name for u in self._hooked()])

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What did not go the fast way, a sentence each."""
        touched = tuple(
            f"{name} was read outside its unit {count} times, whole each time" for name, count in self._fetched.items()
        )
        return (*self.engine.fallbacks, *self.store.fallbacks, *self._lacks, *touched)

    def statistics(self) -> SessionStatistics:
        device = self.device.statistics()
        run = self._executor.statistics() if self._executor is not None else None
        return SessionStatistics(
            passes=run.passes if run else 0,
            read_bytes=self.engine.statistics().read_bytes,
            uploaded_bytes=device.uploaded_bytes,
            device_peak_bytes=device.peak_bytes,
            totals=self.timeline.totals(),
            restarts=run.restarts if run else 0,
            fetched=dict(self._fetched),
        )

    def close(self) -> None:
        """Unhooks the model, stops the lanes, gives memory and files back. Its parameters are errors from now on."""
        if self._is_closed:
            return
        self._is_closed = True
        with ExitStack() as last:  # whatever fails before, memory and files go back, in this order
            last.callback(self.engine.close)
            last.callback(self.store.close)
            for handle in self._handles:
                handle.remove()
            self._uninstall()
            for module, name, buffer in self._buffers:
                module._buffers[name] = buffer
            if self._executor is not None:
                self._executor.close()
            self._binder.unbind(tuple(self.anatomy.owners))
            self._binder.clear()
            self.store.check_integrity()

    # What absent parameters ask for.

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """See `Fetcher`."""
        self._refuse_if_closed(name)
        return self.store.rows(name, ids)

    def whole(self, name: str) -> torch.Tensor:
        """See `Fetcher`."""
        self._refuse_if_closed(name)
        self._fetched[name] = self._fetched.get(name, 0) + 1
        if (first := self.placement.first_rows.get(name)) is not None:
            here = [self.store.whole(name)] if first else []
            return torch.cat([*here, self.store.whole(host_part(name, first))])
        return self.store.whole(name)

    def _refuse_if_closed(self, name: str) -> None:
        if self._is_closed:
            raise ClosedError(f"the model was closed, and {name} with it; use it inside its `with` block")

    # The rendezvous.

    def _hook(self, unit: Unit) -> None:
        travels = unit.name in self.placement.bundles
        reads_only = not self.device.has_memory

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            me = threading.get_ident()
            if module is self.root:
                self._active.clear()  # nothing is outside it, so what is there was interrupted
                self._unbind()
            if self._active and self._active[-1][0] != me:
                raise ModelError("the model is running in another thread; run it in one thread at a time")
            if self._active:  # inside another unit, whose slot must stay: what is absent here is fetched whole
                self._active.append((me, None))
                return
            self._active.append((me, unit.name))
            lease = self._running().enter(unit.name)
            if not travels or lease is None:
                return
            if torch.is_grad_enabled() and any(_needs_gradient(leaf) for leaf in tree_leaves((args, kwargs))):
                raise ModelError(
                    f"{unit.name} streams its weights and was given an input that needs gradients; its weights would "
                    "be gone by the time of the backward pass. Run under torch.no_grad()."
                )
            tensors = self.store.host_tensors if reads_only else self.store.device_tensors
            self._bound = tensors(unit.name, lease.index)
            self._binder.bind(self._bound)

        def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            if not self._active or self._active[-1][0] != threading.get_ident():
                return None  # it was refused
            if self._active.pop()[1] != unit.name:
                return None  # it ran inside another unit
            kept = _detached_from(self._bound, result)
            self._unbind()
            self._crossing.forget()
            if not self._is_closed:
                self._running().leave()
            return kept

        self._handles += [
            unit.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
            unit.module.register_forward_hook(leave, always_call=True),
        ]

    def _begin_pass(self) -> None:
        """The whole model is entered: what an interrupted pass left bound or open is put right."""
        self._active.clear()
        self._unbind()
        self._running().begin_pass()

    def _unbind(self) -> None:
        if self._bound:
            self._binder.unbind(self._bound)
            self._bound = {}

    def _running(self) -> Executor:
        assert self._executor is not None
        return self._executor


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def _detached_from(bound: Mapping[str, torch.Tensor], result: Any) -> Any:
    """A unit's result, with copies of tensors that are views of a slot; None when there are none."""
    slots = {t.untyped_storage().data_ptr() for t in bound.values()}

    def is_in_slot(leaf: Any) -> bool:
        return type(leaf) in (torch.Tensor, nn.Parameter) and leaf.untyped_storage().data_ptr() in slots

    if not slots or not any(map(is_in_slot, tree_leaves(result))):
        return None
    return tree_map(lambda leaf: leaf.clone() if is_in_slot(leaf) else leaf, result)


def token_check(root: nn.Module, planned: int, kv_bytes_per_token: int) -> Callable[..., None]:
    """A check for `Session.before_pass`: refuses a pass whose keys and values would break the memory budget.

    Args:
        root: the model.
        planned: tokens of all sequences together that memory was set aside for.
        kv_bytes_per_token: what each of them takes.
    """

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = args[0] if args else kwargs.get("inputs_embeds")
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        asked = ids.shape[0] * (ids.shape[1] + past)
        if asked > planned:
            raise BudgetError(
                f"{ids.shape[0]} sequences of {ids.shape[1] + past} tokens need "
                f"{format_bytes(asked * kv_bytes_per_token)} of keys and values, but memory was planned for "
                f"{planned:,} tokens ({format_bytes(planned * kv_bytes_per_token)}). Load the model with batch= and "
                "context= as large as you need, or with a larger budget."
            )

    return check
