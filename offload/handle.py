"""The handle of a model under offload: what `load` and `wrap` return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from offload.budgets import Division
from offload.errors import PackingError, StrictError
from offload.io.heap import Reserve
from offload.planner.placement import Tier
from offload.planner.workspace import PASSAGE, heap_nbytes
from offload.runtime.probe import disk_rate
from offload.runtime.rates import resident_products
from offload.runtime.session import Session
from offload.runtime.warmup import warm_kernels
from offload.specs import Budgets, ModelSpec, Products, Workload

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""


class Offloaded:
    """A model under offload. A context manager that gives the model; also calls and generates itself.

    Attributes:
        model: the module. Its weights are in memory only while they are used.
        session: its runtime, with counters and the timeline.
        spec, budgets, division: what was decided, and from what.
        weights: the format of packed matrices.
        ready_s: seconds from the call until the model could be used.
        disk_bytes_per_s: measured read rate; None when nothing is read or nobody asked.
        products: what products with weights in memory take; None when nobody asked, or there are too few.
    """

    def __init__(
        self,
        model: nn.Module,
        session: Session,
        spec: ModelSpec,
        budgets: Budgets,
        division: Division,
        work: Workload,
        link_bytes_per_s: float | None,
    ) -> None:
        self.model: Any = model
        self.session, self.spec, self.budgets, self.division, self.work = session, spec, budgets, division, work
        self.link_bytes_per_s = link_bytes_per_s
        self.disk_bytes_per_s: float | None = None
        self.products: Products | None = None
        self.ready_s = 0.0
        self.checkpoint_nbytes = 0
        self.weights = "none"
        self._restore: Callable[[], None] | None = None
        self._another: Callable[..., tuple[Division, Session]] | None = None
        self._packs = False  # what stays, from the next division on
        self._notes: list[str] = []
        self._is_strict = False
        self._heap = Reserve(0)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own generate."""
        return self.model.generate(*args, **kwargs)

    @property
    def resident_nbytes(self) -> int:
        """Bytes of weights that stay in memory, on any tier."""
        home = self.division.placement.home
        return sum(s.nbytes for n, s in self.session.store.sources.items() if home[n] is not Tier.DISK)

    @property
    def streamed_nbytes(self) -> int:
        """Bytes of weights that live on disk. Tables among them are read by the row."""
        home = self.division.placement.home
        return sum(s.nbytes for n, s in self.session.store.sources.items() if home[n] is Tier.DISK)

    @property
    def cpu_nbytes(self) -> int:
        """Bytes of weights that the CPU multiplies by, beside an accelerator."""
        return sum(t.nbytes for parts in self.division.placement.host_parts.values() for t in parts)

    @property
    def weight_errors(self) -> dict[str, float]:
        """Relative errors of matrices that were packed approximately while loading, by parameter."""
        return {name: error for name, error in self.session.store.weight_errors.items() if error}

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What did not go the fast way, a sentence each."""
        return (*self._notes, *self.session.fallbacks, *([self._heap.reason] if self._heap.reason else []))

    def measure_disk(self) -> float | None:
        """Measures the disk's read rate (0.4 s), for bounds; None when nothing lives on disk.

        Call it while the model is not running: the lanes have filled their rings by then, and the disk is idle.
        """
        with self._heap.lent(PASSAGE):  # which measuring takes: both at once were not planned for
            self.disk_bytes_per_s = disk_rate(self.session.store)
        return self.disk_bytes_per_s

    @property
    def can_divide(self) -> bool:
        """Whether `divide_again` is to be had: of a loaded model that computes in main memory."""
        return self._another is not None and not self.session.device.has_memory

    def divide_again(self, work: Workload) -> None:
        """Divides memory anew, for this work, and gives the model a session in which weights lie as that says.

        Weights that stay as before are not read again. Call it between passes; counters of the session begin anew.
        Memory that `work` does not need any more must be free already. Where the model was loaded with `packs_later`,
        what stays is packed from now on; should a matrix not take to that, all stays as it is stored.

        Raises:
            BudgetError: it does not fit; the model can run on as it was.
            StorageError: reading failed; the model is closed.
        """
        assert self._another is not None
        before = self.session
        self.division, self.session = self._another(work, before, packs=self._packs)
        self.work = work
        before.close()
        try:
            _start(self, None, self._is_strict)
        except PackingError as error:
            self._packs = False
            self._notes.append(f"weights were not packed: {error}")
            self.session.close()
            self.division, self.session = self._another(work, None, packs=False)
            start(self, None, self._is_strict)
        except BaseException:
            self.close()
            raise

    def measure_products(self) -> Products | None:
        """Measures products with what stays in memory (0.1 s), for predictions; None on an accelerator of its own, and
        where too little stays. Call it as `measure_disk`.
        """
        if self.session.device.torch_device.type == "cpu":
            self.products = resident_products(self.session.store, self.session.kernels, self.session.anatomy.linears)
        return self.products

    def close(self) -> None:
        """Stops everything and gives memory and files back. A wrapped module gets its parameters back."""
        if self._restore is not None:
            self._restore()  # may be called again if it was interrupted: the swap file is there until it is through
            self._restore = None
        try:
            self.session.close()
        finally:
            self._heap.close()


def start(handle: Offloaded, progress: Progress | None, strict: bool) -> None:
    """Fills what stays and starts the lanes; an error closes the handle."""
    try:
        _start(handle, progress, strict)
    except BaseException:
        handle.close()
        raise


def _start(handle: Offloaded, progress: Progress | None, strict: bool) -> None:
    session = handle.session
    total = session.store.fill_nbytes()
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("filling memory", done, total)

    dtypes = Counter(source.dtype for source in session.store.sources.values())
    dtype = dtypes.most_common(1)[0][0]
    session.store.fill(count, lambda: warm_kernels(dtype, session.device.torch_device))
    session.start()
    if session.device.torch_device.type == "cpu" and not handle._heap.nbytes:
        handle._heap = Reserve(heap_nbytes(handle.division.workspace, handle.work))
    if strict and session.fallbacks:
        raise StrictError("strict mode: " + "; ".join(session.fallbacks))
