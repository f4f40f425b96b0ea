"""Runs all probes in turn and puts their figures into a profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from offload.errors import StorageError
from offload.hardware import disk_of, fingerprint, gpus, host_memory, versions
from offload.kernels.chosen import Kernels
from offload.probes import blocks, disk, linears, links, memory, others, quiet, software
from offload.probes.area import Area
from offload.probes.effort import Effort
from offload.probes.interference import Activity, matrix, repeat
from offload.probes.sampling import Meter, Now
from offload.probes.subject import Shape, Subject
from offload.profile import CopyRate, Lane, MemoryRate, OpTable, Processor, Profile, Tier
from offload.units import MIB, format_rate

Progress = Callable[[str, int, int], None]
PARTS = 9
FORMATS = ("lossless", "int8", "int4-32")
GEMM_ROWS = 256
STREAM = (4 * MIB, 8)  # bytes of a block and blocks in flight of what runs beside something else
DRAM = {"dram": 1.0}
FAST_TABLES, EXACT_TABLES = ("block", "attention"), ("block", "decode_attention")  # attention of prompts is torch's
NOT_BUILT = AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError


@dataclass
class Figures:
    """What has been measured so far.

    Attributes:
        keys: name -> rate, of the figures that are repeated at the end.
        again: how to measure them.
    """

    processors: dict[str, Processor] = field(default_factory=dict)
    lanes: dict[str, Lane] = field(default_factory=dict)
    ops: list[OpTable] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, float] = field(default_factory=dict)
    again: dict[str, Callable[[], float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """What is read and written: a path and, for files without a name, a descriptor.

    Attributes:
        read: the model's largest file, or the scratch file.
        write: the scratch file; None where there is no room for one.
    """

    read: tuple[Path, int | None]
    write: tuple[Path, int] | None


class Survey:
    """One measuring of this machine.

    Args:
        subject: what for.
        effort: how much.
        folder: on the disk that writing is measured on.
        formats: of weights, beside those that the subject has.
        progress: called with (what is measured, parts done, parts in all).
        now: the clock.
    """

    def __init__(
        self,
        subject: Subject,
        effort: Effort,
        folder: Path,
        formats: Sequence[str] = (),
        progress: Progress = lambda *_: None,
        now: Now = time.perf_counter,
    ) -> None:
        self._subject, self._effort, self._folder, self._now, self._progress = subject, effort, folder, now, progress
        self._formats = tuple(dict.fromkeys((*formats, *(FORMATS if effort.all_formats else ()))))
        self._meter = Meter(effort.rounds, effort.point_s, now=now)
        self._gpu = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
        self._found = Figures()
        self._done = 0

    def run(self) -> Profile:
        """Measures everything. Files it makes have no name, so nothing stays behind whatever happens.

        Raises:
            StorageError: the model's files cannot be read, or without a model the disk is too full for a scratch file.
        """
        neighbours = quiet.Neighbours()
        with ExitStack() as stack, torch.no_grad():
            self._next("memory")
            area = stack.enter_context(Area(self._effort.area_nbytes))
            self._memory(area)
            self._next("disk")
            files = stack.enter_context(self._files())
            self._disk(files)
            self._next("blocks")
            self._software(files)
            self._blocks(area)
            self._next("products")
            self._ops(area, self._meter)
            self._processor(area)
            self._next("packed weights")
            self._packed(area, self._meter)
            area.fill()
            if self._gpu is not None:
                self._next("GPU")
                self._on_gpu(self._gpu)
            self._next("both at once")
            with self._activities(area, files) as activities:
                self._found.kept = matrix(activities, self._effort.rate_s)
            self._next("key figures again")
            repeated = quiet.repeat_keys(self._found.keys, self._found.again)
        share = neighbours.share()
        self._found.notes += quiet.notes(share, repeated)
        return self._profile(share, repeated)

    def _next(self, what: str) -> None:
        self._progress(what, self._done, PARTS)
        self._done += 1

    # Memory and disk.

    def _memory(self, area: Area) -> None:
        figures = memory.memory(area, self._meter)
        best, small = figures.read[-1].bytes_per_s, figures.small_pages.bytes_per_s
        self._memory_rates = figures.read, figures.copy
        self._found.notes.append(
            f"memory in pages of 4 KiB is read at {format_rate(small)}, {small / best:.2f} of the rate in huge pages"
        )
        self._key("memory read", lambda: memory.read(area, self._meter).bytes_per_s, best)
        self._key("memory copy", lambda: memory.copy(area, self._meter).bytes_per_s, figures.copy[-1].bytes_per_s)

    @contextmanager
    def _files(self) -> Iterator[Files]:
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(disk.scratch(self._folder, self._effort.scratch_nbytes))
            except StorageError as error:
                if not self._subject.files:
                    raise
                self._found.notes.append(f"writing was not measured: {error}")
                scratch = None
            if self._subject.files:
                yield Files((self._subject.files[0], None), scratch)
            else:
                assert scratch is not None
                disk.fill(*scratch, now=self._now)
                yield Files(scratch, scratch)

    def _disk(self, files: Files) -> None:
        effort, (path, fd) = self._effort, files.read
        rates = tuple(disk.rates(path, effort.blocks, effort.rate_s, fd=fd, now=self._now))
        best = max(rates, key=lambda r: r.bytes_per_s)
        long = disk.sustained(path, best, effort.sustained_s, fd=fd, now=self._now)
        self._found.lanes["read"] = Lane(rates=rates, sustained_bytes_per_s=long.later, shares=DRAM)
        if not 0.9 < long.first / long.later < 1.1 and effort.sustained_s > 1:
            self._found.notes.append(
                f"reading began at {format_rate(long.first)} and went on at {format_rate(long.later)}"
            )
        self._found.notes += disk.fallbacks(path, fd)
        again = partial(disk.sustained, path, best, effort.rate_s, fd=fd, now=self._now)
        self._key("disk read", lambda: again().later, long.later)
        if files.write is not None:
            path, fd = files.write
            disk.fill(path, fd, now=self._now)
            writes = tuple(disk.rates(path, effort.write_blocks, effort.rate_s, fd=fd, is_write=True, now=self._now))
            self._found.lanes["write"] = Lane(rates=writes, shares=DRAM)

    # Computing.

    def _software(self, files: Files) -> None:
        path, fd = files.read
        self._found.costs |= {
            "read_submit": software.read_submit_s(path, fd, self._meter),
            "handoff": software.handoff_s(self._meter),
            "unit": software.unit_s(self._meter),
            "first": software.first_s(self._meter),
            "sleep": software.sleep_s(self._meter),
            "touch": software.touch_s(self._meter),
        }

    def _blocks(self, area: Area) -> None:
        subject, effort = self._subject, self._effort
        if subject.config is None or subject.heads is None:
            self._found.notes.append("blocks were not measured: the model's configuration does not tell its heads")
            return
        rows = tuple(dict.fromkeys((1, 8, 64, *(t for t in effort.tokens if t > 64))))
        unit_s = self._found.costs["unit"]
        try:
            for exact in (False, True):
                timed = blocks.Blocks(subject, effort.layers, unit_s, self._meter, area, exact=exact)
                figures = timed.figures(rows, effort.tokens if not exact else effort.tokens[:1], effort.kv_tokens)
                self._found.ops += (t for t in figures.tables if t.op in (EXACT_TABLES if exact else FAST_TABLES))
                self._found.costs.setdefault("step", figures.step_s)
                self._found.costs.setdefault("start", figures.start_s)
        except NOT_BUILT as error:  # what an architecture asks for that a small model of it does not have
            self._found.notes.append(f"blocks were not measured: {type(error).__name__}: {error}")

    def _ops(self, area: Area, meter: Meter) -> None:
        subject, effort, found = self._subject, self._effort, self._found.ops
        rows = (*effort.rows, *(n for n in effort.torch_rows if n > max(effort.rows)))
        found += linears.plain_tables(subject.shapes, subject.dtype, rows, effort.torch_rows, area, meter)
        if subject.heads is not None:  # too quick to be seen as the difference of two models
            found += others.attention_tables(subject.heads, subject.dtype, effort.kv_tokens, area, meter)
        if subject.hidden:
            found += others.small_tables(subject.hidden, subject.heads, subject.dtype, effort.rows[::3], meter)
        found += others.optimizer_tables(effort.params, area, meter)

    def _packed(self, area: Area, meter: Meter) -> None:
        subject = self._subject
        wanted = {f: s for f, s in subject.matrices.items() if f != subject.dtype_name}
        for format in self._formats:
            if format != "lossless" or subject.dtype is torch.bfloat16:
                wanted.setdefault(format, subject.shapes)
        for format, shapes in wanted.items():
            tables = linears.packed_tables(shapes, format, subject.dtype, self._effort.rows, area, meter)
            self._found.ops += tables

    def _processor(self, area: Area) -> None:
        """The roofline: memory by threads, and the best rates of large products."""
        read, copy = self._memory_rates
        threads = torch.get_num_threads()
        flops = {
            str(d)[6:]: self._flops(area, d, self._meter) for d in dict.fromkeys((self._subject.dtype, torch.float32))
        }
        self._found.processors["cpu"] = Processor(
            flops=flops,
            memory=read,
            copy=copy,
            cores=threads,
            efficiency=self._efficiency(max(r.bytes_per_s for r in read), "cpu"),
            launch_s=software.launch_s(self._meter),
            shares=DRAM,
        )
        dtype, shape = self._subject.dtype, self._largest(area)
        weights, kernels = area.copies(shape, dtype), Kernels("cpu", exact=False)
        nbytes = weights[0].nbytes

        def product() -> float:
            return nbytes / self._meter.time(*linears.product(weights, 1, kernels)).seconds

        self._key("product", product, product())
        self._key("large product", partial(self._flops, area, dtype, self._meter), flops[str(dtype)[6:]])

    def _efficiency(self, read: float, processor: str) -> float:
        """The part of the memory's rate that a product with one row reaches, at the largest matrix."""
        itemsize = self._subject.dtype.itemsize
        tables = [t for t in self._found.ops if t.op == "linear" and t.processor == processor]
        rates = [t.shape[0] * t.shape[1] * itemsize / t.curve.seconds(1) for t in tables]
        return min(1.0, max(0.05, max(rates, default=0.8 * read) / read))

    def _all_flops(self, area: Area, meter: Meter) -> dict[str, float]:
        return {str(d)[6:]: self._flops(area, d, meter) for d in dict.fromkeys((self._subject.dtype, torch.float32))}

    def _flops(self, area: Area, dtype: torch.dtype, meter: Meter) -> float:
        shape = self._largest(area)
        weights = area.copies(shape, dtype)[:2]
        kernels = Kernels(meter.device.partition(":")[0], exact=True)
        sample = meter.time(*linears.product(weights, GEMM_ROWS, kernels))
        return 2.0 * GEMM_ROWS * shape[0] * shape[1] / sample.seconds

    def _largest(self, area: Area) -> Shape:
        """The largest matrix that fits several times."""
        fitting = [s for s in self._subject.shapes if s[0] * s[1] * 4 <= area.nbytes // 2]
        return max(fitting, key=lambda s: s[0] * s[1], default=(256, 256))

    def _on_gpu(self, device: str) -> None:
        """The same for a GPU, and its link."""
        meter = Meter(self._effort.rounds, self._effort.point_s, device, self._now)
        found: dict[str, list[CopyRate]] = {lane: [] for lane in links.DIRECTIONS}
        for lane, rate in links.rates(device, self._effort.copies, meter):
            found[lane].append(rate)
        self._found.lanes |= {lane: Lane(rates=tuple(rates), shares=DRAM) for lane, rates in found.items()}
        with Area(self._effort.area_nbytes, device) as area:
            self._ops(area, meter)
            numbers = area.bytes.view(torch.float32)
            read = meter.time(numbers.sum)
            rate = MemoryRate(1, read.rate(area.nbytes), read.spread)
            one = torch.ones(16, device=device)
            self._found.processors["device"] = Processor(
                flops=self._all_flops(area, meter),
                memory=(rate,),
                efficiency=self._efficiency(rate.bytes_per_s, "device"),
                launch_s=meter.time(*[one.neg] * 256).seconds,
            )
            self._packed(area, meter)

    # Both at once, and the end.

    @contextmanager
    def _activities(self, area: Area, files: Files) -> Iterator[list[Activity]]:
        now, (path, fd) = self._now, files.read
        dtype, shape, params = self._subject.dtype, self._largest(area), max(self._effort.params)
        block = min(STREAM[0], max(b for b, _ in self._effort.blocks))
        with ExitStack() as stack:
            reading = stack.enter_context(disk.stream(path, block, STREAM[1], fd=fd, now=now))
            found = [Activity(name="read", loop=lambda over: disk.rate_of(reading.run(1e9, over)))]
            if files.write is not None:
                path, fd = files.write
                writing = stack.enter_context(disk.stream(path, block, STREAM[1] // 2, fd=fd, is_write=True, now=now))
                found.append(Activity(name="write", loop=lambda over: disk.rate_of(writing.run(1e9, over))))
            if self._gpu is not None:
                found += stack.enter_context(links.activities(self._gpu, max(self._effort.copies), now))
                there = torch.full(shape, 0.01, dtype=dtype, device=self._gpu)
                runs = linears.product([there], 1, Kernels("cuda", exact=True))
                finish = partial(torch.cuda.synchronize, self._gpu)
                found.append(Activity(name="device", loop=repeat(runs, now, finish), is_lane=False))
            weights = area.copies(shape, dtype)
            small = linears.product(weights, 1, Kernels("cpu", exact=False))
            large = linears.product(weights, GEMM_ROWS, Kernels("cpu", exact=True))
            found += [
                Activity(name="cpu", loop=repeat(small, now), is_lane=False),
                Activity(name="cpu.gemm", loop=repeat(large, now), is_lane=False),
                Activity(name="cpu.adamw", loop=repeat(others.steps(params, area), now), is_lane=False),
            ]
            yield found

    def _key(self, name: str, measure: Callable[[], float], first: float) -> None:
        self._found.keys[name], self._found.again[name] = first, measure

    def _profile(self, neighbours: float, repeated: quiet.Repeated) -> Profile:
        found, subject = self._found, self._subject
        host, where = host_memory(), disk_of(subject.files[0] if subject.files else self._folder)
        installed = {name: version or "none" for name, version in versions().items()}
        tiers = [
            Tier(
                name="host",
                capacity_nbytes=min(host.total, host.limit or host.total),
                processor="cpu",
                load="read",
                store="write" if "write" in found.lanes else None,
            ),
            Tier(name="disk", capacity_nbytes=where.total),
        ]
        if self._gpu is not None:
            total = torch.cuda.get_device_properties(self._gpu).total_memory
            tiers.insert(0, Tier(name="device", capacity_nbytes=total, processor="device", load="h2d", store="d2h"))
        return Profile(
            name=subject.name,
            source="measured",
            tiers=tuple(tiers),
            lanes=found.lanes,
            processors=found.processors,
            ops=tuple(found.ops),
            costs=found.costs,
            interference=found.kept,
            shared={"dram": found.processors["cpu"].bytes_per_s},
            drift=abs(repeated.drift),
            noise=repeated.noise,
            neighbours=neighbours,
            fingerprint=fingerprint(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=installed
            | {"effort": self._effort.name, "disk": f"{where.filesystem} on {where.source}"}
            | {f"gpu {gpu.index}": gpu.name for gpu in gpus()},
            notes=tuple(found.notes),
        )
