"""What one op takes on one processor: from the profile's tables, else from a roofline of the op's flops and bytes.

The ops that a profile should hold, by name (those of `offload.kernels.OPS`, and two more), and what they are over:

    linear, linear_lossless, linear_int8, linear_int4    (outputs, inputs)             rows
    linear_transposed                                    (outputs, inputs)             rows; a matrix as Conv1D has it
    linear_groups                                        (outputs, inputs)             rows of one expert of many
    unpack_lossless, dequantize_int8, dequantize_int4    (outputs, inputs)             rows (always 1: a whole matrix)
    decode_attention                                     (heads, kv heads, head dim)   bytes of keys and values read
    attention                                            (heads, kv heads, head dim)   tokens of one prompt, all at once
    block                                                (hidden,)                     rows: one decoder layer without
                                                                                       its matrices and its attention
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from types import MappingProxyType

from offload.planner.experts import rows_of_experts
from offload.profile import FORMAT_BITS, OpCost, Profile
from offload.specs import ModelSpec, TensorSpec, UnitSpec, Workload

FEW = 64  # rows up to which a kernel multiplies; torch's matrix products take the rest (runtime/linears.py)
MANY = 256  # rows beyond which products only compute: where their weights come from makes no difference
VERY_FEW = 4  # rows of a product that is as quick as its weights are read
_UNPACK = {"lossless": "unpack_lossless", "int8": "dequantize_int8", "int4": "dequantize_int4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One pass over the model.

    Attributes:
        sequences: at a time.
        tokens: new ones of each sequence.
        past: tokens of each sequence whose keys and values are there already.
    """

    sequences: int
    tokens: int
    past: int = 0

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens

    @property
    def family(self) -> str:
        """Of the residuals that computing it leaves; see `offload.profile.Learned`."""
        names = (VERY_FEW, "few"), (FEW, "some"), (MANY, "many")
        return f"compute.{next((name for most, name in names if self.rows <= most), 'bulk')}"


def prefill(work: Workload) -> Phase:
    """The pass over the prompts."""
    return Phase(sequences=work.batch, tokens=max(1, work.prompt_tokens))


def decode(work: Workload) -> Phase:
    """A pass that makes one token of each sequence, in the middle of generating."""
    return Phase(sequences=work.batch, tokens=1, past=(work.prompt_tokens + work.total_tokens) // 2)


@dataclass(frozen=True, slots=True)
class Sum:
    """Seconds with their uncertainty (absolute, one spread), and whether all of them came from tables."""

    seconds: float = 0.0
    spread_s: float = 0.0
    estimated_s: float = 0.0

    def __add__(self, other: Sum) -> Sum:
        return Sum(
            self.seconds + other.seconds,
            sqrt(self.spread_s**2 + other.spread_s**2),
            self.estimated_s + other.estimated_s,
        )

    def times(self, n: float) -> Sum:
        return Sum(self.seconds * n, self.spread_s * n, self.estimated_s * n)


@dataclass(frozen=True)
class OpCosts:
    """Prices ops on one processor.

    Attributes:
        profile: the machine.
        processor: cpu or device.
        exact: torch's own ops only.
        link_bytes_per_s: pace of an emulated accelerator's link; None: the machine has a real one, or none.
    """

    profile: Profile
    processor: str
    exact: bool = False
    link_bytes_per_s: float | None = None
    _known: dict[tuple[object, ...], Sum] = field(default_factory=dict, compare=False, repr=False)

    def unit(
        self,
        unit: UnitSpec,
        spec: ModelSpec,
        phase: Phase,
        streams: frozenset[str] = frozenset(),
        first_rows: Mapping[str, int] = MappingProxyType({}),
    ) -> Sum:
        """A unit's forward.

        Args:
            streams: tensors that are not in their memory format.
            first_rows: matrix -> its first row that the CPU multiplies by, beside an accelerator.
        """
        rows = phase.sequences if unit.is_head else phase.rows
        total = Sum(self.profile.cost("unit"))
        for tensor in unit.tensors:
            if tensor.width and not tensor.is_table:
                format = tensor.stored_format if tensor.name in streams else tensor.format
                format = format or spec.dtype
                if tensor.name in first_rows:
                    total += self.apart(tensor, format, spec.dtype, rows, first_rows[tensor.name])
                else:
                    total += self.matrix(tensor, format, spec.dtype, rows)
        if unit.layers:
            total += (self.attention(spec, phase) + self.block(spec, phase.rows)).times(unit.layers)
        return total

    def matrix(self, tensor: TensorSpec, format: str, dtype: str, rows: int) -> Sum:
        """The product with one matrix, or with those of a stack of experts that the rows choose."""
        outputs, inputs = tensor.elements // tensor.width // max(1, tensor.experts), tensor.width
        if tensor.experts:
            return self.experts(format, dtype, (outputs, inputs), tensor.experts, tensor.chosen, rows)
        return self.linear(format, dtype, outputs, inputs, rows, is_transposed=tensor.is_transposed)

    def experts(self, format: str, dtype: str, shape: tuple[int, int], experts: int, chosen: int, tokens: int) -> Sum:
        """The products of the experts that so many tokens choose, by how many rows each of them gets."""
        key = ("experts", format, dtype, *shape, experts, chosen, tokens)
        if key not in self._known:
            by = self.of_groups(format)
            hit = [
                (self._group(format, dtype, shape, n, by), count)
                for n, count in rows_of_experts(experts, chosen, tokens)
            ]
            self._known[key] = Sum(
                sum(s.seconds * count for s, count in hit),
                sum(s.spread_s * count for s, count in hit),  # not independent: they are read from one curve
                sum(s.estimated_s * count for s, count in hit),
            )
        return self._known[key]

    def of_groups(self, format: str) -> str | None:
        """Whose table has products by experts, each by its own rows; None: it is not known."""
        return self._of("linear_groups", format)

    def _of(self, op: str, format: str) -> str | None:
        """Our kernel, if results need not be torch's, or torch: whichever was measured."""
        tables = (t for t in self.profile.ops if (t.op, t.processor, t.format) == (op, self.processor, format))
        named = {t.implementation for t in tables}
        return "cpu" if "cpu" in named and not self.exact else "torch" if "torch" in named else None

    def _group(self, format: str, dtype: str, shape: tuple[int, int], rows: int, by: str | None) -> Sum:
        """The rows of one expert, beside others."""
        if by is None:
            return self.linear(format, dtype, *shape, rows)
        elements = shape[0] * shape[1]
        nbytes, flops = elements * FORMAT_BITS.get(format, 16) / 8, 2.0 * rows * elements
        return self._cost("linear_groups", by, format, shape, rows, flops=flops, nbytes=nbytes, dtype=dtype)

    def apart(self, tensor: TensorSpec, format: str, dtype: str, rows: int, first: int) -> Sum:
        """A product whose first rows the accelerator has and the others the CPU (runtime/apart.py)."""
        outputs, inputs = tensor.elements // tensor.width, tensor.width
        here = self.linear(format, dtype, first, inputs, rows) if first else Sum()
        width = FORMAT_BITS.get(dtype, 16) / 8
        if rows > FEW:  # the CPU's rows go up instead
            passing = (outputs - first) * inputs * FORMAT_BITS.get(format, 16) / 8
            return self.linear(format, dtype, outputs, inputs, rows) + Sum(self._crossing_s(passing))
        crossing = self._crossing_s(rows * inputs * width) + self._crossing_s(rows * (outputs - first) * width)
        there = OpCosts(self.profile, "cpu").linear(format, dtype, outputs - first, inputs, rows) + Sum(crossing)
        around = Sum(self.profile.cost("apart"))
        if self.processor == "cpu":  # an emulated accelerator: one processor does both, one after the other
            return here + there + around
        return max(here, there, key=lambda s: s.seconds) + around

    def _crossing_s(self, nbytes: float) -> float:
        """Seconds of a small copy that somebody waits for.

        An emulated link is paced by sleeping, which takes longer than asked; what the copy itself takes is in "apart".
        """
        if self.link_bytes_per_s is not None:
            paced = nbytes / self.link_bytes_per_s
            return paced + self.profile.cost("sleep") if paced > self.profile.processors["cpu"].launch_s else 0.0
        link = self.profile.lanes.get("h2d")
        return self.profile.cost("handoff") + (link.seconds(nbytes) if link else 0.0)

    def linear(
        self, format: str, dtype: str, outputs: int, inputs: int, rows: int, *, is_transposed: bool = False
    ) -> Sum:
        """y = x W^T; W lies as [inputs, outputs] where it is transposed."""
        key = ("linear", format, dtype, outputs, inputs, rows, is_transposed)
        if key not in self._known:
            self._known[key] = self._linear(format, dtype, outputs, inputs, rows, is_transposed)
        return self._known[key]

    def _linear(self, format: str, dtype: str, outputs: int, inputs: int, rows: int, is_transposed: bool) -> Sum:
        kind = format.partition("-")[0]
        kernel = "gpu" if self.processor == "device" else "cpu"
        shape, elements = (outputs, inputs), outputs * inputs
        flops, few = 2.0 * rows * elements, rows <= FEW and not self.exact
        if kind not in _UNPACK:
            nbytes = elements * FORMAT_BITS.get(kind, 16) / 8
            op, by = "linear", self._of_plain(rows)
            if is_transposed:  # where it was not measured, what torch makes of the other layout is the nearest
                known = self._of("linear_transposed", format)
                op, by = ("linear", "torch") if known is None else ("linear_transposed", known)
            return self._cost(op, by, kind, shape, rows, flops=flops, nbytes=nbytes, dtype=dtype)
        packed = elements * FORMAT_BITS.get(format, FORMAT_BITS[kind]) / 8
        if few:
            return self._cost(f"linear_{kind}", kernel, format, shape, rows, flops=flops, nbytes=packed, dtype=dtype)
        whole = 2.0 * elements
        unpack = self._cost(_UNPACK[kind], kernel, format, shape, 1, flops=0.0, nbytes=packed + whole, dtype=dtype)
        plain = self._of_plain(rows)
        product = self._cost("linear", plain, dtype, shape, rows, flops=flops, nbytes=whole, dtype=dtype)
        return unpack + product

    def _of_plain(self, rows: int) -> str:
        """Whose table has products with plain weights: the kernels' where they were measured with many rows, too."""
        if self.exact or self.processor == "device":
            return "torch"
        by_kernels = (t for t in self.profile.ops if t.op == "linear" and t.implementation == "cpu")
        return "cpu" if rows <= FEW or any(t.curve.anchors[-1].x > FEW for t in by_kernels) else "torch"

    def attention(self, spec: ModelSpec, phase: Phase) -> Sum:
        """Attention of one layer, all sequences."""
        if not spec.kv_layers or not spec.heads:
            return Sum()
        shape = (spec.heads, spec.kv_heads, spec.head_dim)
        width = FORMAT_BITS.get(spec.dtype, 16) / 8
        per_token = spec.kv_bytes_per_token / spec.kv_layers
        if phase.tokens == 1:
            nbytes = per_token * phase.sequences * (phase.past + 1)
            flops = 4.0 * spec.heads * spec.head_dim * phase.sequences * (phase.past + 1)
            return self._cost(
                "decode_attention", None, spec.dtype, shape, nbytes, flops=flops, nbytes=nbytes, dtype=spec.dtype
            )
        seen = phase.tokens * (phase.past + phase.tokens / 2)
        flops = 4.0 * spec.heads * spec.head_dim * seen
        nbytes = per_token * (phase.past + phase.tokens) + 2 * width * phase.tokens * spec.heads * spec.head_dim
        one = self._cost(
            "attention", None, spec.dtype, shape, phase.tokens, flops=flops, nbytes=nbytes, dtype=spec.dtype
        )
        if phase.sequences == 1:
            return one
        call = self._cost("attention", None, spec.dtype, shape, 1, flops=0.0, nbytes=0.0, dtype=spec.dtype)
        least = min(call.seconds, one.seconds)  # of a call: all sequences are in one
        return one.times((least + phase.sequences * (one.seconds - least)) / one.seconds)

    def block(self, spec: ModelSpec, rows: int) -> Sum:
        """Norms, rotary embedding, activation, residuals and the Python around them, of one layer."""
        nbytes = rows * (16.0 * spec.hidden_nbytes + 4.0 * spec.widest_nbytes)
        hidden = spec.hidden_nbytes * 8 // int(FORMAT_BITS.get(spec.dtype, 16))
        launches = 14 * self.profile.processors[self.processor].launch_s
        found = self._cost("block", None, spec.dtype, (hidden,), rows, flops=0.0, nbytes=nbytes, dtype=spec.dtype)
        return found if found.seconds > launches else Sum(launches, 0.3 * launches, launches)

    def _cost(
        self,
        op: str,
        implementation: str | None,
        format: str,
        shape: tuple[int, ...],
        amount: float,
        *,
        flops: float,
        nbytes: float,
        dtype: str,
    ) -> Sum:
        found: OpCost | None = None
        ours = "gpu" if self.processor == "device" else "cpu"
        for wanted in dict.fromkeys((implementation or ("torch" if self.exact else ours), implementation)):
            found = found or self.profile.op_seconds(
                op, processor=self.processor, format=format, shape=shape, amount=amount, implementation=wanted
            )
        if found is None:
            found = self.profile.roofline(processor=self.processor, flops=flops, nbytes=nbytes, dtype=dtype)
        seconds = found.seconds * self.profile.calibration.get(op, 1.0)
        return Sum(seconds, seconds * found.spread, seconds if found.origin == "roofline" else 0.0)
