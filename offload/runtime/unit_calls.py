"""One run of a unit by one micro-batch: its forward, the same again with a graph, and the gradients from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from offload.runtime.timeline import now
from offload.tiers.stash import Ticket

Graph = tuple[list[torch.Tensor], list[torch.Tensor]]  # inputs, outputs


@dataclass(slots=True)
class Part:
    """A unit, and the parameters below it.

    Attributes:
        forward: the module's own.
        inputs_nbytes, graph_nbytes: what a micro-batch's inputs and its graph took when they were last seen.
        keeps: whether its graph is kept from forward to backward.
        swaps: whether what it was given by other units waits on disk between forward and backward.
        swap_nbytes: how much that is, of one micro-batch, when it was last seen.
        forward_s: what running it again took, when it was last measured.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    forward: Callable[..., Any]
    index: int
    inputs_nbytes: int = 0
    graph_nbytes: int = 0
    keeps: bool = False
    swaps: bool = False
    swap_nbytes: int = 0
    forward_s: float = 0.0


@dataclass(slots=True)
class Call:
    """A run, and how its tensors go back to arguments.

    Attributes:
        leaves, spec: arguments, flat and how to nest them; where a tensor belongs (`where`) is None.
        seed: of random numbers, which the run draws on `device`.
        out_leaves, out_spec: the same of results.
        graph: what was kept from forward for backward, if the unit keeps it.
        away: of the tensors that came in, by place among them, those that were put away.
    """

    part: Part
    leaves: list[Any]
    where: list[int]
    spec: TreeSpec
    seed: int
    device: torch.device
    out_spec: TreeSpec | None = None
    out_leaves: list[Any] = field(default_factory=list)
    graph: Graph | None = None
    away: dict[int, Ticket] = field(default_factory=dict)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The module's own forward; returns the tensors among its results."""
        leaves = list(self.leaves)
        for at, tensor in zip(self.where, tensors, strict=True):
            leaves[at] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        sow(self.seed, self.device)
        result = self.part.forward(*args, **kwargs)
        sow(self.seed + 1, self.device)  # of what the model does between units
        self.out_leaves, self.out_spec = tree_flatten(result)
        return [leaf for leaf in self.out_leaves if isinstance(leaf, torch.Tensor)]

    def with_graph(self, tensors: Sequence[torch.Tensor], needs: Sequence[bool], *, measures: bool) -> Graph:
        """The forward under autograd, on tensors of its own.

        Args:
            needs: which tensors will need a gradient.
            measures: whether the part notes what this took.
        """
        inputs = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            if not measures:
                return inputs, self.run(inputs)
            seen = {p.untyped_storage().data_ptr() for p in self.part.parameters.values()}
            seen |= {t.untyped_storage().data_ptr() for t in inputs}
            self.part.inputs_nbytes = sum(t.untyped_storage().nbytes() for t in inputs)
            self.part.graph_nbytes = 0

            def weigh(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    self.part.graph_nbytes += storage.nbytes()
                return tensor

            start = now()
            with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
                outputs = self.run(inputs)
            self.part.forward_s = now() - start
            return inputs, outputs

    def gradients(
        self,
        tensors: Sequence[torch.Tensor],
        needs: Sequence[bool],
        grads: Sequence[torch.Tensor | None],
        *,
        measures: bool,
    ) -> tuple[list[torch.Tensor | None], dict[str, torch.Tensor]]:
        """Those of the tensors that need one, and those of the part's parameters that have one.

        Args:
            grads: of the results that are tensors.
        """
        graph, self.graph = self.graph, None
        if graph is None:
            graph = self.with_graph(tensors, needs, measures=measures)
            self.out_leaves = []
        inputs, outputs = graph
        asked = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [*asked, *self.part.parameters.values()]
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if given and wanted:
            found = torch.autograd.grad(
                [o for o, _ in given], wanted, [g for _, g in given], allow_unused=True, materialize_grads=False
            )
        named = zip(self.part.parameters, found[len(asked) :], strict=True)
        results = iter(found[: len(asked)])
        return [next(results) if needed else None for needed in needs], {n: g for n, g in named if g is not None}


def sow(seed: int, device: torch.device) -> None:
    """Seeds the random numbers of the CPU, and of a device that draws its own."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
