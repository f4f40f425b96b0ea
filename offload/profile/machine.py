"""A machine in numbers: its tiers of memory in order, the lanes between them, its processors and what ops take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import log, prod
from typing import Literal

from offload.errors import UsageError
from offload.profile.curve import Curve
from offload.profile.learned import Learned
from offload.profile.rates import Lane, MemoryRate
from offload.units import format_bytes

Origin = Literal["table", "scaled", "roofline"]
FORMAT_BITS: Mapping[str, float] = {  # of one weight; what a product reads
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "lossless": 12.1,
    "int8": 8.1,
    "int4": 4.25,
    "int4-64": 4.5,
    "int4-128": 4.25,
}


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One kind of memory.

    Attributes:
        name: device, host, disk, or any other; tiers stand in a list, fastest first.
        capacity_nbytes: what it holds.
        processor: what computes on it, or None.
        load: the lane that brings bytes from the next tier of the list; None for the last.
        store: the lane that takes bytes there; None for the last, or when nothing is written.
    """

    name: str
    capacity_nbytes: int
    processor: str | None = None
    load: str | None = None
    store: str | None = None


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What computes: for the roofline, where no op table reaches.

    Attributes:
        flops: dtype -> operations per second of large products.
        memory: read rate by threads, ascending; one entry for a GPU.
        copy: the same for copies (a byte read and written counts once).
        efficiency: the part of both that ops reach outside their tables.
        launch_s: an op takes at least this long.
        cores: threads that compute.
        shares: shared capacity -> bytes of it that a byte of weights takes while an op runs.
    """

    flops: Mapping[str, float]
    memory: tuple[MemoryRate, ...]
    copy: tuple[MemoryRate, ...] = ()
    efficiency: float = 0.8
    launch_s: float = 0.0
    cores: int = 1
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.memory or not self.flops:
            raise UsageError("a processor needs flops and at least one memory rate")

    @cached_property
    def bytes_per_s(self) -> float:
        """The best read rate."""
        return max(rate.bytes_per_s for rate in self.memory)

    def flops_of(self, dtype: str) -> float:
        """Operations per second in a dtype; formats of fewer bits compute in the fastest one that is known."""
        return self.flops.get(dtype) or max(self.flops.values())


@dataclass(frozen=True, kw_only=True)
class OpTable:
    """What one op takes at one shape.

    Attributes:
        op: a name of `offload.kernels.OPS`, or a block's rest such as "block" (norms, rotary, residuals).
        implementation: torch, cpu or gpu.
        processor: cpu or device.
        format: of the weights or of what is read: bfloat16, lossless, int8, ...
        shape: (outputs, inputs) of a matrix; (query heads, kv heads, head dim) of attention; () where none matters.
        over: what the curve's x counts: rows, bytes, tokens, params.
        curve: seconds over that.
        threads: that computed it; 0 when all did.
    """

    op: str
    implementation: str
    processor: str
    format: str
    shape: tuple[int, ...]
    over: Literal["rows", "bytes", "tokens", "params"]
    curve: Curve
    threads: int = 0


@dataclass(frozen=True, slots=True)
class OpCost:
    """Seconds of one op, how far they spread (relative), and where they come from."""

    seconds: float
    origin: Origin
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A machine.

    Attributes:
        name: a word or two.
        source: measured, or estimate when any of it was not.
        tiers: fastest first.
        lanes: by name: read and write of the disk, h2d and d2h of a link, others of other tiers.
        processors: by name: cpu, device.
        ops: measured ops.
        costs: what software takes, in seconds, by name; see `cost`.
        interference: lane or processor -> the other -> the part of its own speed that it keeps while the other runs. A
            processor alone stands for products of few rows; cpu.gemm, cpu.adamw and cpu.copy (the copies of an emulated
            link, as fast as they go) for other work of it.
        shared: capacities that several use at once, in bytes per second, by name (`dram`).
        calibration: op family -> factor learned from runs.
        drift: relative change of repeated key figures from the beginning to the end of measuring.
        noise: relative spread of repeated key figures.
        neighbours: the part of the processors' time that other processes took while it was measured.
        fingerprint: of the hardware, see `offload.hardware`.
        date: when it was measured, ISO.
        versions: of what measured.
        notes: sentences for whoever reads the file.
        learned: what runs on this machine have taught; kept in a file of its own.
    """

    name: str
    source: Literal["measured", "estimate"]
    tiers: tuple[Tier, ...]
    lanes: Mapping[str, Lane]
    processors: Mapping[str, Processor]
    ops: tuple[OpTable, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    interference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    calibration: Mapping[str, float] = field(default_factory=dict)
    drift: float = 0.0
    noise: float = 0.0
    neighbours: float = 0.0
    fingerprint: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    learned: Learned = field(default_factory=Learned)

    def __post_init__(self) -> None:
        names = [tier.name for tier in self.tiers]
        if not self.tiers or len(set(names)) < len(names):
            raise UsageError(f"{self.name}: tiers need names of their own, but there are {names}")
        for tier in self.tiers:
            if tier.processor is not None and tier.processor not in self.processors:
                raise UsageError(f"tier {tier.name} computes on {tier.processor!r}; there are {list(self.processors)}")
            for lane in (tier.load, tier.store):
                if lane is not None and lane not in self.lanes:
                    raise UsageError(f"tier {tier.name} uses lane {lane!r}; there are {list(self.lanes)}")
        for tier in self.tiers[:-1]:
            if tier.load is None:
                raise UsageError(f"tier {tier.name} is not the last, so it needs a lane that loads from the next")
        known = {*self.lanes, *self.processors}
        for who, others in self.interference.items():
            for name in (who, *others):
                if name.partition(".")[0] not in known:
                    raise UsageError(f"interference names {name!r}; there are {', '.join(sorted(known))}")

    def tier(self, name: str) -> Tier:
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise UsageError(f"{self.name} has no tier {name!r}; it has {', '.join(t.name for t in self.tiers)}")

    def lane(self, name: str) -> Lane:
        if name not in self.lanes:
            raise UsageError(f"{self.name} has no lane {name!r}; it has {', '.join(self.lanes)}")
        return self.lanes[name]

    def kept(self, who: str, other: str) -> float:
        """The part of its own speed that `who` keeps while `other` runs; 1 where nothing was measured."""
        return self.interference.get(who, {}).get(other, 1.0)

    def cost(self, name: str) -> float:
        """Seconds of software: 0 where nothing was measured.

        unit          entering and leaving a unit
        start         once: the generation loop before its first pass
        first         the first product with a number of rows, beyond what later ones take
        first_torch   the same of torch's own product, which exact results, odd layouts and 5 to 7 rows take
        step          once a token: the generation loop around the model
        sleep         the shortest sleep: what pacing an emulated link takes each time
        apart         a product in two places, beyond both its products
        read_submit   handing a read to the engine
        read_alone    a read that the disk waits for, beyond its part of a steady stream
        assemble      copying a MiB that was read in pieces to its place
        handoff       waking a waiting thread
        waking        a block's forward whose thread has waited before it, beyond one that follows another at once
        """
        return self.costs.get(name, 0.0)

    @cached_property
    def _tables(self) -> Mapping[tuple[str, str, str], list[OpTable]]:
        found: dict[tuple[str, str, str], list[OpTable]] = {}
        for table in self.ops:
            found.setdefault((table.op, table.processor, table.format), []).append(table)
        return found

    def op_seconds(
        self,
        op: str,
        *,
        processor: str,
        format: str,
        shape: tuple[int, ...],
        amount: float,
        implementation: str | None = None,
    ) -> OpCost | None:
        """What a measured op takes; None where no table is near.

        The table of the very shape is interpolated. Of others the nearest in size is scaled by size, in log-log
        between the two around it; that is what `scaled` means.
        """
        tables = [
            t
            for t in self._tables.get((op, processor, format), ())
            if implementation is None or t.implementation == implementation
        ]
        for table in tables:
            if table.shape == shape:
                return OpCost(table.curve.seconds(amount), "table", table.curve.spread(amount))
        tables = [t for t in tables if len(t.shape) == len(shape)]
        if not tables:
            return None
        size = max(1, prod(shape))
        below = max((t for t in tables if prod(t.shape) <= size), key=lambda t: prod(t.shape), default=None)
        above = min((t for t in tables if prod(t.shape) >= size), key=lambda t: prod(t.shape), default=None)
        near = below or above
        assert near is not None
        if below is None or above is None or prod(below.shape) == prod(above.shape):
            seconds = near.curve.seconds(amount) * size / max(1, prod(near.shape))
        else:
            low, high = below.curve.seconds(amount), above.curve.seconds(amount)
            share = log(size / prod(below.shape)) / log(prod(above.shape) / prod(below.shape))
            seconds = low ** (1 - share) * high**share
        least = self.processors[processor].launch_s if processor in self.processors else 0.0
        return OpCost(max(seconds, least), "scaled", near.curve.spread(amount))

    def roofline(self, *, processor: str, flops: float, nbytes: float, dtype: str) -> OpCost:
        """What an op takes that no table knows: the slower of computing and reading, at the usual efficiency."""
        if processor not in self.processors:
            raise UsageError(f"{self.name} has no processor {processor!r}; it has {', '.join(self.processors)}")
        unit = self.processors[processor]
        seconds = max(flops / unit.flops_of(dtype), nbytes / unit.bytes_per_s) / unit.efficiency
        return OpCost(max(seconds, unit.launch_s), "roofline", 0.3)

    def describe(self) -> str:
        """One line."""
        tiers = ", ".join(f"{t.name} {format_bytes(t.capacity_nbytes)}" for t in self.tiers)
        return f"{self.name} ({self.source}): {tiers}"
