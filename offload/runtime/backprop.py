"""Runs a model's units under autograd, a unit at a time, and tells the owner of their weights when each is used.

The forward of a unit keeps its inputs and nothing else; its backward runs it again, with a graph, and takes the
gradients of its inputs and of its parameters from that. (Units that may, and the last one, keep their graph instead.)
What other units made of the weights may wait on disk in between (`tiers/stash.py`), or beside an accelerator in main
memory (`tiers/ashore.py`).
So autograd walks from unit to unit in reverse, and entering one is the rendezvous with its weights, as in inference.

Random numbers, as dropout draws them, depend on the step, the micro-batch and the unit alone: running a unit again
draws the same ones, in whatever order micro-batches pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from offload.errors import ModelError
from offload.runtime.losses import use_pieces
from offload.runtime.timeline import now
from offload.runtime.turns import Turns, run
from offload.tiers.ashore import Ashore
from offload.tiers.stash import Stash, can_put

Gradients = Mapping[str, torch.Tensor]
Loss = Callable[[], torch.Tensor]


class Owner(Protocol):
    """Who has the weights."""

    def enter(self, unit: str, *, is_backward: bool) -> None:
        """The first micro-batch is about to enter: the unit's parameters must hold their weights."""

    def visit(self, unit: str, number: int) -> None:
        """A micro-batch is about to run forward."""

    def add(self, unit: str, gradients: Gradients) -> None:
        """The gradients of one micro-batch; the parameters still hold the weights."""

    def leave(self, unit: str, *, is_backward: bool) -> None:
        """The last micro-batch has left."""


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
class _Call:
    """One run of a unit by one micro-batch: how its tensors go back to arguments."""

    part: Part
    leaves: list[Any]
    where: list[int]
    spec: TreeSpec
    seed: int
    device: torch.device
    out_spec: TreeSpec | None = None
    out_leaves: list[Any] = field(default_factory=list)
    graph: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
    away: dict[int, Any] = field(default_factory=dict)  # of the tensors that came in, those that wait on disk

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


class Backprop:
    """Puts itself between a model and its units until it is closed.

    Args:
        root: the model; those of its parameters that require gradients are trained.
        units: (name, module) in any order; they must not contain each other.
        owner: is told of every visit.
        seed: of random numbers.
        device: where it computes.

    Attributes:
        stash: where inputs wait that are swapped; None: nowhere.
        held_nbytes: of inputs that have been left where they are in this pass.
        is_pressed: whether memory is so short that inputs are swapped even if their units were not told to.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[tuple[str, nn.Module]],
        owner: Owner,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._owner, self._seed, self._device = owner, seed, device or torch.device("cpu")
        self.stash: Stash | Ashore | None = None
        self.held_nbytes = 0
        self.is_pressed: Callable[[], bool] = lambda: False
        self._away: list[tuple[int, int, list[Any]]] = []  # unit's place, micro-batch, what waits on disk
        names = {id(p): n for n, p in root.named_parameters()}
        self.parts: dict[str, Part] = {}
        self._own_forward: dict[str, Any] = {}
        for name, module in units:
            own = {names[id(p)]: p for p in module.parameters() if p.requires_grad}
            self.parts[name] = Part(name, module, own, module.forward, len(self.parts))
            self._own_forward[name] = module.__dict__.get("forward")
            module.forward = self._wrapped(self.parts[name])  # type: ignore[method-assign]
        self._own_loss_back = use_pieces(root)
        self._local = threading.local()  # of a micro-batch: number, now (unit and direction), inside, seen
        self._turns = Turns(1)
        self._step = 0
        self._learns = False
        self._is_running = False
        self.order: list[str] = []  # units in the order in which the last pass entered them
        self.measures = False

    def run(self, losses: Sequence[Loss], scales: Sequence[float] | None, step: int) -> list[float]:
        """Runs every micro-batch forward and, with `scales`, backward.

        Args:
            losses: each runs the model on one micro-batch.
            scales: what each loss is multiplied by; None: forward only.
            step: which step this is, for random numbers.

        Returns:
            The losses, not multiplied.
        """
        self._turns, self._step = Turns(len(losses)), step
        self._learns, self.order, self.held_nbytes = scales is not None, [], 0
        found = [0.0] * len(losses)

        def body(number: int) -> None:
            self._local.number, self._local.inside, self._local.seen, self._local.now = number, None, set(), None
            sow(self._random(number, len(self.parts)), self._device)
            with torch.set_grad_enabled(self._learns):
                loss = losses[number]()
            if scales is not None:
                # In this thread also where autograd has one for a device: micro-batches take turns in it.
                with torch.autograd.set_multithreading_enabled(False):
                    loss.backward(torch.tensor(scales[number], dtype=loss.dtype, device=loss.device))
            found[number] = float(loss.detach())  # waits for a device that computes on its own, so at the end
            self._leave()

        state = torch.get_rng_state()
        self._is_running = True
        try:
            run([body] * len(losses), self._turns)
        finally:
            self._is_running = False
            torch.set_rng_state(state)
            self._away.clear()
            if self.stash is not None:
                self.stash.clear()
        return found

    def close(self) -> None:
        """Gives the units their own forward back, the model its loss, and the stash its memory and disk."""
        if self.stash is not None:
            self.stash.close()
        self._own_loss_back()
        for name, part in self.parts.items():
            part.module.__dict__.pop("forward", None)
            if self._own_forward[name] is not None:
                part.module.forward = self._own_forward[name]  # type: ignore[method-assign]

    # Visits.

    def _enter(self, part: Part, *, is_backward: bool) -> None:
        """Waits for this micro-batch's turn in a unit. The last unit of a forward pass is the first of the backward
        pass, and one turn is both: nothing is kept between them but for one micro-batch."""
        number, before = self._local.number, self._local.now
        is_same = is_backward and before == (part.name, False)
        if before is not None and not is_same:
            self._leave()
            self._turns.next(number)
        if self._turns.is_first() and not is_same:
            self._owner.enter(part.name, is_backward=is_backward)
            if not is_backward:
                self.order.append(part.name)
        self._local.now = (part.name, is_backward)
        if not is_backward:
            self._owner.visit(part.name, number)

    def _leave(self) -> None:
        """A micro-batch is about to end its turn."""
        if self._local.now is not None and self._turns.is_last():
            unit, is_backward = self._local.now
            self._owner.leave(unit, is_backward=is_backward)

    def _wrapped(self, part: Part) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._is_running:
                return part.forward(*args, **kwargs)
            if self._local.inside is not None:
                raise ModelError(f"{part.name} runs inside {self._local.inside}; such models cannot be trained yet")
            if part.name in self._local.seen:
                raise ModelError(f"{part.name} runs more than once a pass; such models cannot be trained yet")
            self._local.seen.add(part.name)
            leaves, spec = tree_flatten((args, kwargs))
            where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            tensors = [leaves[k] for k in where]
            for k in where:
                leaves[k] = None
            call = _Call(part, leaves, where, spec, self._random(self._local.number, part.index), self._device)
            anchor = torch.zeros((), requires_grad=True)  # without one, autograd would not come back to the first unit
            out = _Unit.apply(self, call, anchor, *tensors)
            assert call.out_spec is not None
            results = iter(out)
            leaves = [next(results) if isinstance(leaf, torch.Tensor) else leaf for leaf in call.out_leaves]
            call.out_leaves = []
            return tree_unflatten(leaves, call.out_spec)

        return forward

    def _random(self, number: int, unit: int) -> int:
        """A seed for the random numbers of one unit's run."""
        mixed = self._seed
        for part in (self._step, number, unit):
            mixed = (mixed * 6364136223846793005 + part * 2 + 1442695040888963407) % (1 << 62)
        return mixed

    def forward(self, call: _Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A unit's forward, for _Unit."""
        part = call.part
        self._enter(part, is_backward=False)
        call.away = self._put_away(call, tensors)
        self._local.inside = part.name
        try:
            if part.keeps and self._learns:
                call.graph = self._with_graph(call, tensors, [t.requires_grad for t in tensors])
                return [t.detach() for t in call.graph[1]]
            with torch.no_grad():
                return [t.detach() for t in call.run(tensors)]
        finally:
            self._local.inside = None

    def _put_away(self, call: _Call, tensors: Sequence[torch.Tensor]) -> dict[int, Any]:
        """Lets inputs go to disk, if this unit's do; its turn has begun. Returns which of them, and where they are."""
        part = call.part
        waits = [k for k, t in enumerate(tensors) if t.requires_grad and can_put(t)]  # others are the same everywhere
        if self.measures:
            part.swap_nbytes = sum(tensors[k].untyped_storage().nbytes() for k in waits)
        is_last = part.index == len(self.parts) - 1  # its backward follows at once
        if self.stash is None or not self._learns or part.keeps or is_last or not (part.swaps or self.is_pressed()):
            self.held_nbytes += sum(tensors[k].untyped_storage().nbytes() for k in waits)
            return {}
        away: dict[int, Any] = {k: self.stash.put(tensors[k]) for k in waits}
        self._away.append((len(self.order), self._local.number, list(away.values())))
        return away

    def _bring_back(self, call: _Call, saved: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A unit's inputs, those that were put away too; its turn has begun."""
        if self.stash is None or not call.away:
            return list(saved)
        if self._away:  # the backward pass begins
            order = sorted(self._away, key=lambda entry: (-entry[0], entry[1]))
            self._away.clear()
            self.stash.expect([ticket for _, _, tickets in order for ticket in tickets])
        left = iter(saved)
        count = len(saved) + len(call.away)
        return [self.stash.take(call.away[k]) if k in call.away else next(left) for k in range(count)]

    def backward(
        self, call: _Call, saved: Sequence[torch.Tensor], needs: Sequence[bool], grads: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """A unit's backward, for _Unit: gives its parameters' gradients to the owner, returns those of its inputs."""
        part = call.part
        self._enter(part, is_backward=True)
        tensors = self._bring_back(call, saved)
        self._local.inside = part.name
        try:
            graph, call.graph = call.graph, None
            if graph is None:
                graph = self._with_graph(call, tensors, needs)
                call.out_leaves = []
            inputs, outputs = graph
            asked = [t for t, needed in zip(inputs, needs, strict=True) if needed]
            given = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            wanted = [*asked, *part.parameters.values()]
            found: Sequence[torch.Tensor | None] = [None] * len(wanted)
            if given and wanted:
                found = torch.autograd.grad(
                    [o for o, _ in given], wanted, [g for _, g in given], allow_unused=True, materialize_grads=False
                )
            del graph, outputs
        finally:
            self._local.inside = None
        named = zip(part.parameters, found[len(asked) :], strict=True)
        self._owner.add(part.name, {name: g for name, g in named if g is not None})
        results = iter(found[: len(asked)])
        return [next(results) if needed else None for needed in needs]

    def _with_graph(
        self, call: _Call, tensors: Sequence[torch.Tensor], needs: Sequence[bool]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inputs = [t.detach().requires_grad_(needed) for t, needed in zip(tensors, needs, strict=True)]
        with torch.enable_grad():
            if not self.measures:
                return inputs, call.run(inputs)
            seen = {p.untyped_storage().data_ptr() for p in call.part.parameters.values()}
            seen |= {t.untyped_storage().data_ptr() for t in inputs}
            call.part.inputs_nbytes = sum(t.untyped_storage().nbytes() for t in inputs)
            call.part.graph_nbytes = 0

            def weigh(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    call.part.graph_nbytes += storage.nbytes()
                return tensor

            start = now()
            with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
                outputs = call.run(inputs)
            call.part.forward_s = now() - start
            return inputs, outputs


class _Unit(torch.autograd.Function):
    """One run of a unit as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, backprop: Backprop, call: _Call, anchor: torch.Tensor, *tensors: torch.Tensor) -> Any:
        ctx.backprop, ctx.call = backprop, call
        ctx.gives_up_outputs = type(call.part.module) is nn.Linear  # whose backward does not read them; see losses.py
        ctx.set_materialize_grads(False)
        outputs = backprop.forward(call, tensors)
        ctx.save_for_backward(*[t for k, t in enumerate(tensors) if k not in call.away])
        ctx.mark_non_differentiable(*[t for t in outputs if not t.is_floating_point()])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[3:]
        found = ctx.backprop.backward(ctx.call, ctx.saved_tensors, needs, grads)
        return (None, None, None, *found)


def sow(seed: int, device: torch.device) -> None:
    """Seeds the random numbers of the CPU, and of a device that draws its own."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
