"""The definition of correct: a plain loop that holds weights, gradients and optimizer state in memory.

    gradients      each micro-batch's in the model's dtype; summed in float32, last use of a tied parameter first;
                   rounded once to the model's dtype
clipping       by the 2-norm over all parameters, as torch.nn.utils.clip_grad_norm_
update         float32 master and moments, the same kernel; the weight is the master, rounded. Or another optimizer's
                   step on a whole parameter
dropout        random numbers that follow from step, micro-batch and unit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from offload.kernels import choose, reference
from offload.optim.base import Numbers, Optimizer
from offload.runtime.discovery import dissect
from offload.tiers.cells import ALIGNMENT


class ReferenceLoop:
    """Trains `model` (parameters of one dtype) in place.

    Args:
        max_grad_norm: None for no clipping.
        seed: of dropout.
        rule: the optimizer, if it is not AdamW with `numbers`.
        numbers: betas, eps, weight_decay of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_grad_norm: float | None,
        seed: int = 0,
        rule: Optimizer | None = None,
        **numbers: Any,
    ) -> None:
        self.model, self._max_norm, self._seed, self._numbers = model, max_grad_norm, seed, numbers
        self._rule = rule
        self._states: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._units = [u.module for u in dissect(model, shares=False).units]
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names = list(self._trained)
        self._masters = {n: p.detach().float().clone() for n, p in self._trained.items()}
        self._moments = {n: (torch.zeros_like(m), torch.zeros_like(m)) for n, m in self._masters.items()}
        self._step_kernel = choose("adamw_step", "cpu").function()
        self._square_sum = choose("square_sum", "cpu").function()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def step(self, batches: Sequence[dict[str, torch.Tensor]], lr: float) -> None:
        self._steps += 1
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        uses: dict[str, list[list[torch.Tensor]]] = {n: [] for n in self._names}
        losses = []
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            losses.append(self._backward(number, batch, count / sum(counts), uses))
        self.losses.append(sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts))
        gradients = self.gradients = {n: self._summed(n, uses[n]) for n in self._names}
        norm = math.sqrt(math.fsum(self._square_sum(_padded(g)) for g in gradients.values()))
        self.norms.append(norm)
        clip = 1.0 if self._max_norm is None else min(1.0, self._max_norm / (norm + 1e-6))
        for name, parameter in self._trained.items():
            if self._rule is not None:
                self._apply(self._rule, name, parameter, Numbers(step=self._steps, learning_rate=lr, grad_scale=clip))
                continue
            numbers = dict(self._numbers)
            if parameter.dim() < 2:
                numbers["weight_decay"] = 0.0
            given = reference.AdamW(lr=lr, step=self._steps, grad_scale=clip, **numbers)
            state = [_padded(t) for t in (self._masters[name], *self._moments[name])]
            self._step_kernel(*state, _padded(gradients[name]), None, given)
            count, shape = parameter.numel(), parameter.shape
            master, *moments = (t[:count].view(shape) for t in state)
            self._masters[name], self._moments[name] = master, tuple(moments)
            parameter.data.copy_(master)

    def _apply(self, rule: Optimizer, name: str, parameter: nn.Parameter, numbers: Numbers) -> None:
        """One step of a whole parameter by another optimizer."""
        shape = (-1, parameter.shape[-1]) if parameter.dim() > 1 else (-1,)

        def form(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.reshape(shape).clone() if rule.whole_rows else _padded(tensor)

        if name not in self._states:
            weights = form(parameter.detach())
            self._states[name] = torch.empty(rule.state_nbytes(tuple(weights.shape)), dtype=torch.uint8)
            rule.start(self._states[name], weights)
        cell = form(self.gradients[name])
        rule.step(self._states[name], cell, numbers, decays=parameter.dim() > 1)
        parameter.data.copy_(cell.reshape(-1)[: parameter.numel()].view(parameter.shape))

    def _backward(
        self, number: int, batch: dict[str, torch.Tensor], scale: float, uses: dict[str, list[list[torch.Tensor]]]
    ) -> float:
        """Plain autograd; a parameter that several modules hold gets a leaf of its own in each, to see every use."""
        leaves: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter, str]] = []
        names = {id(p): n for n, p in self.model.named_parameters()}
        for module in self.model.modules():
            for attribute, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    leaf = nn.Parameter(parameter.detach().clone())
                    leaves.append((module, attribute, parameter, leaf, names[id(parameter)]))
                    module._parameters[attribute] = leaf
        hooks = []
        for index, unit in enumerate(self._units):
            seed = self._random(number, index)
            hooks.append(unit.register_forward_pre_hook(lambda *_, s=seed: seeded(s)))
            hooks.append(unit.register_forward_hook(lambda *_, s=seed: seeded(s + 1)))
        try:
            seeded(self._random(number, len(self._units)))
            loss = self.model(**batch, use_cache=False).loss
            loss.backward(torch.tensor(scale, dtype=loss.dtype))
        finally:
            for hook in hooks:
                hook.remove()
            for module, attribute, parameter, _, _ in leaves:
                module._parameters[attribute] = parameter
        found: dict[str, list[torch.Tensor]] = {}
        for _, _, _, leaf, name in reversed(leaves):  # the backward pass meets the last use first
            found.setdefault(name, []).append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        for name, gradients in found.items():
            uses[name].append(gradients)
        return float(loss.detach())

    def _summed(self, name: str, gradients: list[list[torch.Tensor]]) -> torch.Tensor:
        """Use by use, and within it micro-batch by micro-batch."""
        ordered = [batch[use] for use in range(len(gradients[0])) for batch in gradients]
        total = ordered[0].float().clone()
        for gradient in ordered[1:]:
            total += gradient
        return total.to(gradients[0][0].dtype)

    def _random(self, number: int, unit: int) -> int:
        mixed = self._seed
        for part in (self._steps, number, unit):
            mixed = (mixed * 6364136223846793005 + part * 2 + 1442695040888963407) % (1 << 62)
        return mixed


def seeded(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """In one dimension and filled up with zeros: kernels treat what is left over of 32 elements apart."""
    flat = tensor.reshape(-1)
    return functional.pad(flat, (0, -len(flat) % ALIGNMENT)).contiguous()
