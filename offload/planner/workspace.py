"""Memory that a run needs beside its weights: keys and values, activations, what libraries take while they work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.planner.ops import FEW
from offload.profile import FORMAT_BITS
from offload.specs import ModelSpec, TensorSpec, Workload
from offload.units import MIB, format_bytes

LIBRARIES = 80 * MIB  # set aside for kernels, thread stacks and allocator slack that appear with the first passes
LOADED = 20 * MIB  # what is there of them, as measured, once weights are loaded
RUNNING = 36 * MIB  # and once it has generated
HOLES = 0.5  # of the workspace: freed memory that an allocator cannot give out again in one piece
MOST_HOLES = 48 * MIB  # large blocks come from the system and go back to it
MOST_RESERVED = 448 * MIB  # of the heap: blocks that come and go cut a larger one into pieces that the next do not fit
RESERVED = 64 * MIB  # in place of more: what is large is mapped then, and unmapped
PROBES = 4  # reads in flight while a disk's rate is measured, none larger than the file
PASSAGE = 64 * MIB  # buffers that loading uses on the way to a device, and measuring the disk's rate
PASSING = 16 * MIB  # of a matrix at a time, as in runtime/apart.py
MARGIN = 0.01  # of the budget, for what nobody predicted


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Bytes beside the weights, by purpose.

    Attributes:
        kv: keys and values of all sequences, and the copy of one layer's that appending makes.
        activations: of the widest point of one pass over the prompts.
        logits: of the last token of each sequence, with generation's float32 copies.
        appended: of `kv`, that copy; runtime/cache.py makes none.
    """

    kv: int
    activations: int
    logits: int
    appended: int = 0

    @property
    def nbytes(self) -> int:
        return self.kv + self.activations + self.logits

    def explain(self) -> str:
        """The sum, for an error."""
        return (
            f"{format_bytes(self.kv)} keys and values + {format_bytes(self.activations)} activations + "
            f"{format_bytes(self.logits)} logits"
        )


def workspace(spec: ModelSpec, work: Workload) -> Workspace:
    """What a workload needs.

    A pass over B sequences of T tokens holds, at its widest, three activations of the widest matrix (gate, up and their
    product) and about six hidden states; attention on the CPU adds a mask of T x T bytes a sequence, and of one at a
    time where sequences share a pool, in which nothing is appended either. A mixture holds the rows of all the experts
    that its tokens choose.
    """
    tokens = work.pass_tokens or work.batch * work.prompt_tokens
    kv = spec.kv_bytes_per_token * work.kept_tokens
    appended, masks = (0, 1) if work.pool_tokens else (3 * kv // max(1, spec.kv_layers), work.batch)
    widest = max(3 * spec.widest_nbytes, mixed_nbytes(spec))
    return Workspace(
        kv=kv + appended,
        activations=tokens * (widest + 6 * spec.hidden_nbytes) + masks * work.prompt_tokens**2,
        logits=work.batch * spec.logits_nbytes,
        appended=appended,
    )


def expected_peak(
    base: int, weights: int, rings: int, need: int, *, passing: int = 0, on_disk: int = 0, crossing: int = 0
) -> int:
    """The largest resident set of a run, of three moments of which each has memory that the others have not.

    Filling memory (rings are not touched yet), measuring the disk's rate before the first pass, and generating. What
    `divide` sets aside is more: that is for what nobody expects.

    Args:
        base: the process before any weight.
        weights, rings: bytes of the process's memory that hold weights, and that streaming passes through.
        need: what a run takes beside them.
        passing: bytes that go through buffers while memory fills: to a device, or to be packed.
        on_disk: bytes that live on disk, whose rate is measured by reading them.
        crossing: see `crossing_nbytes`; for the length of a product.
    """
    filling = LOADED + min(PASSAGE, passing)
    measuring = LOADED + rings + min(PASSAGE, PROBES * on_disk)
    return base + weights + max(filling, measuring, RUNNING + rings + need + _holes(need) + crossing)


def heap_nbytes(need: Workspace, work: Workload) -> int:
    """What of that is reserved before the first pass: what libraries allocate while they run, and the holes between.

    Of much, only what is small: 8192 tokens of a model whose activations are 64 MiB wide found no place for three of
    them in a reserve of 636 MiB, of which 510 were in use, and took 190 MiB beside it. Keys and values of a pool have
    memory of their own.
    """
    wanted = _allocated(need, work)
    return wanted if wanted <= MOST_RESERVED else RESERVED


def used_nbytes(need: Workspace, work: Workload, *, exact: bool) -> int:
    """What of that will be there at once: a reserve is, as a whole; what is mapped is while it is used."""
    is_mapped = _allocated(need, work) > MOST_RESERVED and not exact
    return need.nbytes - (need.appended if is_mapped else 0)


def _allocated(need: Workspace, work: Workload) -> int:
    allocated = need.nbytes - (need.kv if work.pool_tokens else 0)
    return allocated + _holes(allocated)


def _holes(allocated: int) -> int:
    return min(int(HOLES * allocated), MOST_HOLES)


def mixed_nbytes(spec: ModelSpec) -> int:
    """Bytes that one token takes among its experts: what goes into a product and comes out, or the gate's two halves
    beside what they make, or rows in the order of experts and of tokens; see runtime/experts.py."""
    itemsize, widest = FORMAT_BITS.get(spec.dtype, 16) / 8, 0
    for t in (t for u in spec.units for t in u.tensors if t.experts):
        outputs = t.elements // t.width // t.experts
        widest = max(widest, t.chosen * (outputs + max(t.width, outputs)))
    return int(widest * itemsize)


def passing_nbytes(spec: ModelSpec) -> int:
    """Device memory set aside for the CPU's rows, which go up where there are many of activations; see
    runtime/apart.py."""
    tensors = (t for u in spec.units for t in u.tensors)
    largest = max((t.elements for t in tensors), default=0) * int(FORMAT_BITS.get(spec.dtype, 16)) // 8
    return 2 * min(PASSING, largest)


def crossing_nbytes(spec: ModelSpec, host_parts: Mapping[str, Sequence[TensorSpec]], work: Workload) -> int:
    """What will be used of it: a head sees the last tokens alone, and few rows are multiplied where weights lie."""
    heads, rows = {u.name for u in spec.units if u.is_head}, work.pass_tokens or work.batch * work.prompt_tokens
    crossed = (t.nbytes for u, ts in host_parts.items() if (work.batch if u in heads else rows) > FEW for t in ts)
    return 2 * min(PASSING, max(crossed, default=0))
