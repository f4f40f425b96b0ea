"""Other machines than the one at hand: more of a memory, a faster lane or processor."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.errors import UsageError
from offload.profile import CopyRate, Curve, MemoryRate, OpTable, Processor, Profile
from offload.profile.curve import Anchor
from offload.specs import Budgets
from offload.units import format_bytes, parse_bytes

MEMORIES = ("cpu-memory", "gpu-memory")
RATES: Mapping[str, tuple[str, ...]] = {  # what a user says -> lanes or processors of a profile
    "disk": ("read", "write"),
    "link": ("h2d", "d2h"),
    "cpu": ("cpu",),
    "gpu": ("device",),
}
_FORM = re.compile(r"\s*(?:(?P<factor>[0-9.]+)\s*[x×]|(?P<sign>[+-]?)\s*(?P<size>[0-9].*))\s*")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is different.

    Attributes:
        what: one of MEMORIES or RATES.
        factor: it is so many times as large or fast.
        add_nbytes: after that, so many bytes more or fewer.
        set_nbytes: or just so large.
    """

    what: str
    factor: float = 1.0
    add_nbytes: int = 0
    set_nbytes: int | None = None

    def __str__(self) -> str:
        if self.set_nbytes is not None:
            return f"{self.what} {format_bytes(self.set_nbytes)}"
        if self.add_nbytes:
            return f"{self.what} {'+' if self.add_nbytes > 0 else '-'}{format_bytes(abs(self.add_nbytes))}"
        return f"{self.what} {self.factor:g}x"

    def memory(self, nbytes: int) -> int:
        """A memory of so many bytes, changed."""
        if self.set_nbytes is not None:
            return self.set_nbytes
        return max(0, int(nbytes * self.factor) + self.add_nbytes)


def parse_change(text: str) -> Change:
    """What "cpu-memory=+32GiB", "gpu-memory=16GiB" or "disk=2x" means.

    Raises:
        UsageError: it names nothing that is known, or no amount.
    """
    what, is_pair, amount = text.partition("=")
    what, known = what.strip(), (*MEMORIES, *RATES)
    if what not in known:
        near = difflib.get_close_matches(what, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--what-if {text!r}: {what!r} is not known{hint}; there are {', '.join(known)}")
    match = _FORM.fullmatch(amount) if is_pair else None
    if match is None:
        raise UsageError(f'--what-if {text!r}: write an amount, such as "cpu-memory=+32GiB" or "disk=2x"')
    if match["factor"]:
        try:
            factor = float(match["factor"])
        except ValueError:
            factor = 0.0
        if not 0.001 <= factor <= 1000:
            raise UsageError(f"--what-if {text!r}: a factor lies from 0.001 to 1000")
        return Change(what, factor)
    if what in RATES:
        raise UsageError(f'--what-if {text!r}: say how many times as fast, such as "{what}=2x"')
    nbytes = parse_bytes(match["size"], f"--what-if {what}")
    if match["sign"]:
        return Change(what, add_nbytes=-nbytes if match["sign"] == "-" else nbytes)
    return Change(what, set_nbytes=nbytes)


def change_budgets(budgets: Budgets, change: Change) -> Budgets:
    """Budgets on a machine with another memory. A memory that is not there stays so."""
    if change.what == "cpu-memory":
        return replace(budgets, cpu_memory=change.memory(budgets.cpu_memory))
    if change.what == "gpu-memory" and budgets.gpu_memory is not None:
        return replace(budgets, gpu_memory=change.memory(budgets.gpu_memory))
    return budgets


def change_profile(profile: Profile, change: Change) -> Profile:
    """A machine with another lane or processor. What it does not have stays so."""
    if change.what not in RATES or change.factor == 1.0:
        return profile
    names, factor = RATES[change.what], change.factor
    lanes = {
        name: replace(
            lane,
            rates=tuple(CopyRate(r.nbytes, r.threads, r.bytes_per_s * factor, r.spread) for r in lane.rates),
            sustained_bytes_per_s=lane.sustained_bytes_per_s * factor if lane.sustained_bytes_per_s else None,
            latency_s=lane.latency_s / factor,
        )
        if name in names
        else lane
        for name, lane in profile.lanes.items()
    }
    processors = {n: _faster(p, factor) if n in names else p for n, p in profile.processors.items()}
    ops = tuple(_quicker(op, factor) if op.processor in names else op for op in profile.ops)
    shared = {n: c * factor for n, c in profile.shared.items()} if change.what == "cpu" else profile.shared
    return replace(profile, lanes=lanes, processors=processors, ops=ops, shared=shared)


def _faster(processor: Processor, factor: float) -> Processor:
    return replace(
        processor,
        flops={dtype: flops * factor for dtype, flops in processor.flops.items()},
        memory=tuple(MemoryRate(r.threads, r.bytes_per_s * factor, r.spread) for r in processor.memory),
    )


def _quicker(op: OpTable, factor: float) -> OpTable:
    return replace(op, curve=Curve(tuple(Anchor(a.x, a.seconds / factor, a.spread) for a in op.curve.anchors)))
