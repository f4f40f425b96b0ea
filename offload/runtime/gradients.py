"""Sums of gradients, and their norm: of one unit at a time, and of parameters that several units use."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from offload.errors import ModelError
from offload.kernels.chosen import Kernels
from offload.runtime.backprop import Gradients
from offload.tiers.cells import Cells
from offload.tiers.device_cells import DeviceCells

PIECE = 1 << 19  # elements: what caches hold, and is worth two threads


class GradientSums:
    """Gradients on their way into cells, rounded once.

    Args:
        cells: where they end: in memory, or on the accelerator that computes.
        loose: parameters whose gradient is complete at the end of the pass only.
        kernels: what computes.
    """

    def __init__(self, cells: Cells | DeviceCells, loose: Collection[str], kernels: Kernels) -> None:
        self._cells, self._loose, self._kernels = cells, loose, kernels
        self._sums: dict[str, torch.Tensor] = {}
        self._squares: dict[str, float] = {}

    def begin(self) -> None:
        """A pass begins."""
        self._squares.clear()

    def add(self, unit: str, gradients: Gradients, *, is_only: bool) -> None:
        """The gradients of one micro-batch.

        Args:
            is_only: there is no other one: what needs no sum goes to the cell at once.
        """
        own = {}
        for name, gradient in gradients.items():
            if is_only and name not in self._loose:
                own[name] = gradient
            else:
                self._sum(name, gradient)
        if is_only:
            self._put(unit, own)

    def finish(self, unit: str) -> None:
        """The last micro-batch's have been added; not called where there is only one."""
        names = [n for n in self._cells.layouts[unit].places if n in self._sums]
        self._put(unit, {n: self._sums.pop(n) for n in names})

    def finish_loose(self, cell: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """The pass has ended: uses of loose parameters outside every unit are added, and all of it goes to the cell."""
        for name in self._loose:
            parameter = parameters[name]
            if parameter.grad is not None:
                self._sum(name, parameter.grad)
                parameter.grad = None
        self._put(cell, {n: self._sums.pop(n) for n in list(self._sums)})

    def norm(self, step: int, losses: list[float]) -> float:
        """The 2-norm of all. Raises ModelError if it is not finite."""
        norm = math.sqrt(math.fsum(self._squares.values()))
        if not math.isfinite(norm):
            raise ModelError(f"the gradient of step {step} is not finite (its norm is {norm}); losses were {losses}")
        return norm

    def close(self) -> None:
        self._sums.clear()

    def _sum(self, name: str, gradient: torch.Tensor) -> None:
        """Adds to a parameter's gradient in float32, in pieces: torch would first copy all of it to float32."""
        if name not in self._sums:
            self._sums[name] = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            return
        total, flat = self._sums[name].view(-1), gradient.reshape(-1)
        for first in range(0, len(flat), PIECE):
            total[first : first + PIECE] += flat[first : first + PIECE]

    def _put(self, unit: str, gradients: Gradients) -> None:
        """Puts the gradient of a cell in place of its weights."""
        for name in self._cells.layouts[unit].places:
            if name in gradients:
                self._cells.views[name].copy_(gradients[name])
            else:
                self._cells.views[name].zero_()
        for name, padded in self._cells.padded(unit):
            self._squares[name] = self._kernels.run("square_sum", padded)
