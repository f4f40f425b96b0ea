"""The implementations that one model computes with: each op is chosen once, and what was chosen can be told."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from offload.kernels import Choice, choose
from offload.kernels.formats.form import Int4Weight, Int8Weight, LosslessWeight, Weight

SAME_BITS = frozenset(("unpack_lossless", "pack_lossless", "quantize_int8", "quantize_int4", "dequantize_int8",
                       "dequantize_int4", "checksum", "move_along"))  # fmt: skip
"""Ops whose implementations all give the same bits, so that exactness asks nothing of them."""

PACKERS = frozenset(("pack_lossless", "quantize_int8", "quantize_int4"))  # matrices are packed in main memory


class Kernels:
    """Ops for tensors on one device.

    Args:
        device: "cpu" or "cuda", a torch device's type.
        exact: torch's own ops only, but for those that give the same bits in any implementation.
        unpacks: products of many rows with a packed matrix are those with the plain one, bit by bit.
    """

    def __init__(self, device: str, *, exact: bool, unpacks: bool = False) -> None:
        self.device, self.exact, self.unpacks = device, exact, unpacks
        self._choices: dict[str, Choice] = {}
        self._parts: dict[str, tuple[Callable[..., Any], Callable[..., str | None], Callable[..., Any]]] = {}
        self._refused: dict[str, Counter[str]] = defaultdict(Counter)

    def choice(self, op: str) -> Choice:
        """Which implementation of `op` this is, and why."""
        if op not in self._choices:
            device = "cpu" if op in PACKERS else self.device
            self._choices[op] = choose(op, device, exact=self.exact and op not in SAME_BITS)
        return self._choices[op]

    def refuses(self, op: str, *args: Any, **kwargs: Any) -> str | None:
        """Why the chosen implementation would not take these; None when it does."""
        return self._of(op)[1](*args, **kwargs)

    def run(self, op: str, *args: Any) -> Any:
        """The op, by the chosen implementation or, where it refuses, by the reference."""
        function, refuses, plain = self._of(op)
        return function(*args) if refuses(*args) is None else plain(*args)

    def attempt(self, op: str, *args: Any, **kwargs: Any) -> Any:
        """The op by the chosen kernel; None where there is none or it refuses, which is counted by reason.

        For callers that have the model's own way to compute it.
        """
        function, refuses, plain = self._of(op)
        if function is plain:
            return None
        if (why := refuses(*args, **kwargs)) is not None:
            self.decline(op, why)
            return None
        return function(*args, **kwargs)

    def decline(self, op: str, why: str) -> None:
        """Counts one time that the model's own ops ran in place of a kernel."""
        self._refused[op][why] += 1

    def report(self) -> dict[str, str]:
        """Op -> implementation and why, of those that were asked for; and how often it refused, and why."""
        return {
            op: "; ".join(
                [f"{c.implementation}: {c.why}", *(f"not {n} times: {w}" for w, n in self._refused[op].items())]
            )
            for op, c in self._choices.items()
        }

    def unpack(self, weight: Weight, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, rounded once to `dtype`."""
        if isinstance(weight, LosslessWeight):
            return self.run("unpack_lossless", weight).to(dtype)  # type: ignore[no-any-return]
        return self.run(f"dequantize_{kind_of(weight)}", weight, dtype)  # type: ignore[no-any-return]

    def _of(self, op: str) -> tuple[Callable[..., Any], Callable[..., str | None], Callable[..., Any]]:
        if op not in self._parts:
            choice = self.choice(op)
            plain = Choice(op, "torch", "").function()
            self._parts[op] = choice.function(), choice.refuses(), plain
        return self._parts[op]


def compile_seconds() -> float:
    """Seconds that compiling kernels took in this process; those from the cache cost nothing."""
    team = sys.modules.get("offload.kernels.cpu.team")
    return float(team.compiled_s) if team is not None else 0.0


def kind_of(weight: Weight) -> str:
    """lossless, int8 or int4."""
    return "int8" if isinstance(weight, Int8Weight) else "int4" if isinstance(weight, Int4Weight) else "lossless"
