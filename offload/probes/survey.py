"""Runs all probes in turn and puts their figures into a profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import torch

from offload.errors import StorageError
from offload.hardware import disk_of, fingerprint, gpus, host_memory, versions
from offload.io.buffers import Buffer
from offload.io.heap import Reserve
from offload.kernels import available
from offload.kernels.chosen import Kernels
from offload.probes import disk, linears, links, memory, others, quiet
from offload.probes.area import Area
from offload.probes.computing import DRAM, GEMM_ROWS, Computing
from offload.probes.effort import Effort
from offload.probes.figures import Figures
from offload.probes.interference import Activity, matrix, repeat
from offload.probes.sampling import Allowance, Meter, Now
from offload.probes.subject import Subject
from offload.profile import Lane, Look, Profile, Tier, together
from offload.units import MIB, format_rate

Progress = Callable[[str, int, int], None]
PARTS = 11
FORMATS = ("lossless", "int8", "int4-32")
WORKING = 128 * MIB  # of activations: as in a run, they lie in memory that stays
MOST_DRIFT = 10.0  # that a profile's file may say: a machine that stood still meanwhile is told by a note
COMPILED_S = 1.0  # less is looking whether there is anything to compile
SMALL_COSTS = 20  # figures of what software takes
STREAM = (4 * MIB, 8)  # bytes of a block and blocks in flight of what runs beside something else


@dataclass(frozen=True)
class Files:
    """What is read and written: a path and, for files without a name, a descriptor.

    Attributes:
        read: the model's largest file, or, where it is shorter than a block, the scratch file.
        write: the scratch file; None where there is no room for one.
    """

    read: tuple[Path, int | None]
    write: tuple[Path, int] | None


class _Touched:
    """Memory that reads go to all the time: fresh memory can be slower than a disk."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = Buffer(nbytes)
        self.buffer.touch()

    def __enter__(self) -> _Touched:
        return self

    def __exit__(self, *_: object) -> None:
        self.buffer.close()


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
        wanted = tuple(dict.fromkeys((*formats, *(FORMATS if effort.all_formats else ()))))
        self._meter = Meter(effort.rounds, effort.point_s, now=now)
        self._gpu = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None
        self._found = Figures()
        self._computing = Computing(subject, effort, wanted, self._meter, self._found)
        self._done = 0
        self._look: Callable[[], float] | None = None  # at the disk's rate of the moment
        self._looks: list[Look] = []

    def run(self) -> Profile:
        """Measures everything. Files it makes have no name, so nothing stays behind whatever happens.

        Raises:
            StorageError: the model's files cannot be read, or they are shorter than a block, or there is no model, and
                the disk is too full for a scratch file.
        """
        self._next("compiling kernels, once")
        self._compile()
        neighbours = quiet.Neighbours()
        with ExitStack() as stack, torch.no_grad():
            self._next("memory")
            self._memory_of_reads = stack.enter_context(_Touched(max(b * n for b, n in self._effort.blocks)))
            area = stack.enter_context(Area(self._effort.area_nbytes))
            stack.enter_context(Reserve(WORKING))
            self._allow("memory", 7)
            self._memory(area)
            self._next("disk")
            files = stack.enter_context(self._files())
            self._disk(files)
            self._next("software")
            self._allow("software", SMALL_COSTS)
            self._computing.software(*files.read)
            self._next("blocks")
            self._allow("blocks", self._computing.figures_of_blocks)
            self._computing.blocks(area)
            self._next("products")
            self._allow("products", self._computing.figures_of_ops)
            self._computing.ops(area, self._meter)
            self._computing.processor(area, *self._memory_rates)
            self._next("packed weights")
            self._allow("packed weights", self._computing.figures_of_packed)
            self._computing.packed(area, self._meter)
            area.fill()
            if self._gpu is not None:
                self._next("GPU")
                self._computing.on_gpu(self._gpu)
            self._next("both at once")
            pairs = count()
            with self._activities(area, files) as activities:
                self._found.kept = matrix(
                    activities, self._effort.pair_s, lambda _: self._look_again() if next(pairs) % 2 else None
                )
            self._next("key figures again")
            self._allow("again", len(self._found.keys))
            repeated = quiet.repeat_keys(self._found.keys, self._found.again)
        share = neighbours.share()
        self._found.notes += quiet.notes(share, repeated)
        return self._profile(share, repeated)

    def _next(self, what: str) -> None:
        self._progress(what, self._done, PARTS)
        self._done += 1
        self._look_again()

    def _allow(self, part: str, figures: int) -> None:
        """From now on figures share the seconds of this part."""
        seconds = self._effort.part_s.get(part)
        self._meter.allowance = None if seconds is None else Allowance(seconds, figures, self._now)

    def _compile(self) -> None:
        """Kernels that no process on this machine has compiled yet are no part of what is measured."""
        if available()["cpu"] == "yes":
            from offload.kernels.cpu.warm import compile_all

            if (seconds := compile_all()) > COMPILED_S:
                self._found.notes.append(f"kernels were compiled, once: {seconds:.0f} s that are no part of measuring")

    def _look_again(self) -> None:
        """The disk's rate of the moment: its mood lasts longer than any one part."""
        if self._look is not None:
            self._looks.append(Look(round(time.time(), 1), self._look()))

    # Memory and disk.

    def _memory(self, area: Area) -> None:
        figures = memory.memory(area, self._meter)
        best, small = figures.read[-1].bytes_per_s, figures.small_pages.bytes_per_s
        self._memory_rates = figures.read, figures.copy
        self._found.notes.append(
            f"memory in pages of 4 KiB is read at {format_rate(small)}, {small / best:.2f} of the rate in huge pages"
        )
        self._found.key("memory read", lambda: memory.read(area, self._meter).bytes_per_s, best)
        self._found.key("memory copy", lambda: memory.copy(area, self._meter).bytes_per_s, figures.copy[-1].bytes_per_s)

    @contextmanager
    def _files(self) -> Iterator[Files]:
        largest = max((nbytes for nbytes, _ in self._effort.blocks), default=0)
        long = next((file for file in self._subject.files if file.stat().st_size >= largest), None)
        with ExitStack() as stack:
            try:
                scratch = stack.enter_context(disk.scratch(self._folder, self._effort.scratch_nbytes))
            except StorageError as error:
                if long is None:
                    raise
                self._found.notes.append(f"writing was not measured: {error}")
                scratch = None
            if long is not None:
                yield Files((long, None), scratch)
            else:
                assert scratch is not None
                disk.fill(*scratch, now=self._now)
                yield Files(scratch, scratch)

    def _disk(self, files: Files) -> None:
        effort, (path, fd), memory = self._effort, files.read, self._memory_of_reads.buffer
        rates = tuple(disk.rates(path, effort.blocks, effort.rate_s, fd=fd, now=self._now, memory=memory))
        best = max(rates, key=lambda r: r.bytes_per_s)
        long = disk.sustained(path, best, effort.sustained_s, fd=fd, now=self._now, memory=memory)
        self._found.lanes["read"] = Lane(rates=rates, sustained_bytes_per_s=long.later, shares=DRAM)
        if not 0.9 < long.first / long.later < 1.1 and effort.sustained_s > 1:
            self._found.notes.append(
                f"reading began at {format_rate(long.first)} and went on at {format_rate(long.later)}"
            )
        self._found.notes += disk.fallbacks(path, fd)
        again = partial(disk.sustained, path, best, effort.look_s, fd=fd, now=self._now, memory=memory)
        self._looks.append(Look(round(time.time(), 1), long.later))
        self._look = lambda: again().later
        self._found.key("disk read", self._look, long.later)
        if files.write is not None:
            path, fd = files.write
            disk.fill(path, fd, now=self._now)
            writes = tuple(disk.rates(path, effort.write_blocks, effort.rate_s, fd=fd, is_write=True, now=self._now))
            self._found.lanes["write"] = Lane(rates=writes, shares=DRAM)

    # Both at once, and the end.

    @contextmanager
    def _activities(self, area: Area, files: Files) -> Iterator[list[Activity]]:
        now, (path, fd) = self._now, files.read
        dtype, shape, params = self._subject.dtype, self._computing.shape(area), max(self._effort.params)
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
            large = linears.product(weights, GEMM_ROWS, Kernels("cpu", exact=False))
            copying = memory.copies(area, block)
            found += [
                Activity(name="cpu.copy", loop=repeat(copying, now), beside=("read", "cpu", "cpu.gemm")),
                Activity(name="cpu", loop=repeat(small, now), is_lane=False),
                Activity(name="cpu.gemm", loop=repeat(large, now), is_lane=False),
                Activity(name="cpu.adamw", loop=repeat(others.steps(params, area), now), is_lane=False),
            ]
            yield found

    def _profile(self, neighbours: float, repeated: quiet.Repeated) -> Profile:
        found, subject = self._found, self._subject
        rate, spread = together(self._looks)
        lane = replace(found.lanes["read"], looks=tuple(sorted(set(self._looks))))
        found.lanes["read"] = lane.times(rate / lane.bytes_per_s, spread)
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
            drift=min(MOST_DRIFT, abs(repeated.drift)),
            noise=min(MOST_DRIFT, repeated.noise),
            neighbours=neighbours,
            fingerprint=fingerprint(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=installed
            | {"effort": self._effort.name, "disk": f"{where.filesystem} on {where.source}"}
            | {f"gpu {gpu.index}": gpu.name for gpu in gpus()},
            notes=tuple(found.notes),
        )
