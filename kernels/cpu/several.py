"""Several calls of kernels with one hand-off to the threads, for work that does not depend on each other.

Small matrices keep two cores busy for less time than it takes to agree that all are done. Each thread takes pieces of
the first call until none is left, then of the second, and so on; nobody waits in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from offload.kernels.cpu.memory import get_i64
from offload.kernels.cpu.team import TeamFunction, team_function


@dataclass(slots=True)
class Call:
    """A kernel with its arguments, not run yet.

    Attributes:
        function, pieces, arguments: what TeamFunction takes.
        keep: owners of the memory that arguments point to.
        result: gives the result, once it has run.
    """

    function: TeamFunction
    pieces: int
    arguments: tuple[int, ...]
    keep: tuple[torch.Tensor, ...]
    result: Callable[[], torch.Tensor]


@intrinsic
def _jump(typing_context: Any, function: Any, argument: Any) -> Any:
    """Calls machine code at an address with one int64."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@team_function("several")
def _several(block: int) -> None:
    for number in range(get_i64(block, 2)):
        _jump(get_i64(block, 3 + 2 * number), get_i64(block, 4 + 2 * number))


def run(calls: Sequence[Call]) -> list[torch.Tensor]:
    """Runs them all; their results in order."""
    if len(calls) == 1:
        calls[0].function(calls[0].pieces, *calls[0].arguments)
        return [calls[0].result()]
    blocks = [(ctypes.c_int64 * (2 + len(call.arguments)))(0, call.pieces, *call.arguments) for call in calls]
    places = (place for pair in zip(calls, blocks, strict=True) for place in (pair[0].function.address, _at(pair[1])))
    _several(sum(call.pieces for call in calls), len(calls), *places)
    return [call.result() for call in calls]


def _at(block: ctypes.Array[ctypes.c_int64]) -> int:
    return ctypes.addressof(block)
