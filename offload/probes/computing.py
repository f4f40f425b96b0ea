"""Probes of what computes: products, blocks, optimizer steps, and the roofline of a processor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from offload.errors import ModelError
from offload.kernels.chosen import Kernels
from offload.probes import blocks, layouts, linears, links, others, software
from offload.probes.area import Area
from offload.probes.effort import Effort
from offload.probes.figures import Figures
from offload.probes.sampling import Meter
from offload.probes.subject import Shape, Subject
from offload.profile import CopyRate, Lane, MemoryRate, OpTable, Processor

GEMM_ROWS = 256
GROWING = 64  # tokens by which keys and values grow while a step is timed again and again
MOST_EXACT = 256  # rows of a block of torch's ops
DRAM = {"dram": 1.0}
FAST_TABLES, EXACT_TABLES = ("block", "attention"), ("block", "decode_attention")  # attention of prompts is torch's


class Computing:
    """Measures a subject's ops into `found`.

    Args:
        formats: of weights, beside those that the subject has.
    """

    def __init__(self, subject: Subject, effort: Effort, formats: Sequence[str], meter: Meter, found: Figures) -> None:
        self._subject, self._effort, self._formats, self._meter, self._found = subject, effort, formats, meter, found

    def software(self, path: Path, fd: int | None) -> None:
        """What software takes beside moving and computing; `path` is read from."""
        self._found.costs |= {
            "read_submit": software.read_submit_s(path, fd, self._meter),
            "read_alone": software.read_alone_s(path, fd, self._found.lanes["read"], self._meter),
            "handoff": software.handoff_s(self._meter),
            "unit": software.unit_s(self._meter),
            "first": software.first_s(self._meter, exact=False),
            "first_torch": software.first_s(self._meter, exact=True),
            "sleep": software.sleep_s(self._meter),
            "apart": software.apart_s(self._meter),
            "assemble": software.assemble_s(self._meter),
        }

    def blocks(self, area: Area) -> None:
        """Blocks without their matrices; a note where the architecture cannot be built small."""
        subject, effort = self._subject, self._effort
        if subject.config is None or subject.heads is None:
            self._found.notes.append("blocks were not measured: the model's configuration does not tell its heads")
            return
        tokens, kept = subject.fitting(effort.tokens), subject.fitting(effort.kv_tokens, beside=GROWING)
        rows = _rows_of_blocks(tokens)
        unit_s = self._found.costs["unit"]
        try:
            for exact in (False, True):
                if exact and not effort.all_formats:  # a long prompt's exact results are not worth seconds of it
                    rows = tuple(n for n in rows if n <= MOST_EXACT)
                timed = blocks.Blocks(subject, effort.layers, unit_s, self._meter, area, exact=exact)
                figures = timed.figures(rows, tokens if not exact else tokens[:1], kept)
                self._found.ops += (t for t in figures.tables if t.op in (EXACT_TABLES if exact else FAST_TABLES))
                self._found.costs.setdefault("step", figures.step_s)
                self._found.costs.setdefault("start", figures.start_s)
                self._found.costs.setdefault("waking", figures.waking_s)
        except ModelError as error:
            self._found.notes.append(f"blocks were not measured: {error}")

    @property
    def figures_of_blocks(self) -> int:
        """About how many figures `blocks` takes: each of two models, and of our own kernels and torch's."""
        tokens = self._subject.fitting(self._effort.tokens)
        each = len(_rows_of_blocks(tokens)) + len(self._effort.kv_tokens) + 3
        return 2 * (2 * each + len(tokens))

    @property
    def figures_of_ops(self) -> int:
        """About how many figures `ops` and `processor` take."""
        subject, effort = self._subject, self._effort
        matrices = len(subject.shapes) + len(subject.transposed) + len(subject.stacks)
        small = 4 * len(effort.rows[::3])
        return matrices * (len(effort.rows) + len(effort.torch_rows)) + len(effort.kv_tokens) + small + 8

    @property
    def figures_of_packed(self) -> int:
        """About how many figures `packed` takes."""
        formats = {*self._formats, *self._subject.matrices} - {self._subject.dtype_name}
        return len(formats) * len(self._subject.shapes) * (len(self._effort.rows) + 1)

    def ops(self, area: Area, meter: Meter) -> None:
        """Products with plain matrices of every layout, attention, small ops and optimizers."""
        subject, effort, found = self._subject, self._effort, self._found.ops
        rows = (*effort.rows, *(n for n in effort.torch_rows if n > max(effort.rows)))
        found += linears.plain_tables(subject.shapes, subject.dtype, rows, effort.torch_rows, area, meter)
        found += layouts.transposed_tables(subject.transposed, subject.dtype, rows, effort.torch_rows, area, meter)
        found += layouts.group_tables(subject.stacks, subject.dtype, rows, effort.torch_rows, area, meter)
        if subject.heads is not None:  # too quick to be seen as the difference of two models
            found += others.attention_tables(subject.heads, subject.dtype, effort.kv_tokens, area, meter)
        if subject.hidden:
            found += others.small_tables(subject.hidden, subject.heads, subject.dtype, effort.rows[::3], meter)
        found += others.optimizer_tables(effort.params, area, meter)

    def packed(self, area: Area, meter: Meter) -> None:
        """Products with packed matrices. What lies in the area is overwritten."""
        subject = self._subject
        wanted = {f: s for f, s in subject.matrices.items() if f != subject.dtype_name}
        for format in self._formats:
            if format != "lossless" or subject.dtype is torch.bfloat16:
                wanted.setdefault(format, subject.shapes)
        for format, shapes in wanted.items():
            self._found.ops += linears.packed_tables(shapes, format, subject.dtype, self._effort.rows, area, meter)

    def processor(self, area: Area, read: tuple[MemoryRate, ...], copy: tuple[CopyRate | MemoryRate, ...]) -> None:
        """The CPU's roofline: memory by threads, and the best rates of large products."""
        flops = self._all_flops(area, self._meter)
        self._found.processors["cpu"] = Processor(
            flops=flops,
            memory=read,
            copy=copy,  # type: ignore[arg-type]
            cores=torch.get_num_threads(),
            efficiency=self._efficiency(max(r.bytes_per_s for r in read), "cpu"),
            launch_s=software.launch_s(self._meter),
            shares=DRAM,
        )
        dtype, shape = self._subject.dtype, self.shape(area)
        weights, kernels = area.copies(shape, dtype), Kernels("cpu", exact=False)
        nbytes = weights[0].nbytes

        def product() -> float:
            return nbytes / self._meter.time(*linears.product(weights, 1, kernels)).seconds

        self._found.key("product", product, product())
        large = partial(self._flops, area, dtype, self._meter)
        self._found.key("large product", large, flops[str(dtype)[6:]])

    def on_gpu(self, device: str) -> None:
        """The same for a GPU, and its link."""
        meter = Meter(self._effort.rounds, self._effort.point_s, device, self._meter.now)
        found: dict[str, list[CopyRate]] = {lane: [] for lane in links.DIRECTIONS}
        for lane, rate in links.rates(device, self._effort.copies, meter):
            found[lane].append(rate)
        self._found.lanes |= {lane: Lane(rates=tuple(rates), shares=DRAM) for lane, rates in found.items()}
        with Area(self._effort.area_nbytes, device) as area:
            self.ops(area, meter)
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
            self.packed(area, meter)

    def shape(self, area: Area) -> Shape:
        """The largest matrix that fits several times."""
        return next((s for s in self._subject.largest if s[0] * s[1] * 4 <= area.nbytes // 2), (256, 256))

    def _efficiency(self, read: float, processor: str) -> float:
        """The part of the memory's rate that a product with one row reaches, at the largest matrix."""
        itemsize = self._subject.dtype.itemsize
        tables: list[OpTable] = [t for t in self._found.ops if t.op == "linear" and t.processor == processor]
        rates = [t.shape[0] * t.shape[1] * itemsize / t.curve.seconds(1) for t in tables]
        return min(1.0, max(0.05, max(rates, default=0.8 * read) / read))

    def _all_flops(self, area: Area, meter: Meter) -> dict[str, float]:
        return {str(d)[6:]: self._flops(area, d, meter) for d in dict.fromkeys((self._subject.dtype, torch.float32))}

    def _flops(self, area: Area, dtype: torch.dtype, meter: Meter) -> float:
        shape = self.shape(area)
        weights = area.copies(shape, dtype)[:2]
        kernels = Kernels(meter.device.partition(":")[0], exact=True)
        sample = meter.time(*linears.product(weights, GEMM_ROWS, kernels))
        return 2.0 * GEMM_ROWS * shape[0] * shape[1] / sample.seconds


def _rows_of_blocks(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((1, 8, 64, *(t for t in tokens if t > 64))))
