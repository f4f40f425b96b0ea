"""What a step will take beside weights, state and rings, before it runs: every kind of unit runs once on a few tokens.

The weights are zeros without memory (pages that are only read are all the same page), and units of a kind that was seen
give what the first one gave. What autograd keeps of a unit grows with the tokens of a row as a polynomial of the second
degree, of which three short rows show the coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from offload.io.buffers import Buffer
from offload.planner.workspace import LIBRARIES
from offload.runtime.losses import AT_ONCE, PIECE
from offload.runtime.unit_calls import Part
from offload.tiers.host import as_tensor

LENGTHS = (16, 32, 48)  # tokens of the rows that are tried
SHORT = 64  # rows of so many tokens are tried as they are
THREAD = 16 << 20  # of a micro-batch's thread and those that compute with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that one micro-batch takes in a unit.

    Attributes:
        graph: what its graph keeps.
        waits: what other units gave it, which waits from its forward to its backward.
        outputs: what it gives.
        gradients: of its parameters, as autograd returns them.
        scratch: what the largest of them takes in float32, as a kernel sums it.
        sums: of its parameters' gradients in float32.
    """

    graph: int
    waits: int
    outputs: int
    gradients: int
    scratch: int
    sums: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """What a step takes, by when.

    Attributes:
        waits: from forward to backward: inputs of units, all micro-batches. They may wait on disk.
        at_once: at the widest point of the backward pass.
    """

    waits: int
    at_once: int

    @property
    def nbytes(self) -> int:
        return self.waits + self.at_once


def working(units: Sequence[Needs], micro_batches: int, loose_sums: int = 0) -> Working:
    """What a step of these units takes, in the order of their forwards.

    Args:
        loose_sums: gradients in float32 of parameters that several units use.
    """
    widest = 0
    for unit in units:
        is_last = unit is units[-1]
        passing = unit.outputs if is_last else 2 * unit.outputs  # the gradient of logits takes their place
        sums = unit.sums if micro_batches > 1 else 0
        widest = max(widest, unit.graph + passing + unit.gradients + max(unit.scratch, sums))
    loss = AT_ONCE * PIECE * torch.float32.itemsize
    threads = THREAD * micro_batches if micro_batches > 1 else 0
    return Working(
        waits=micro_batches * sum(unit.waits for unit in units),
        at_once=widest + loss + loose_sums + threads + LIBRARIES,
    )


def rehearse(
    parts: Mapping[str, Part],
    parameters: Iterable[nn.Parameter],
    run: Callable[[Mapping[str, Any]], None],
    batch: Mapping[str, torch.Tensor],
) -> dict[str, Needs] | None:
    """What every unit takes of a micro-batch, in the order of their forwards. Nothing changes.

    Args:
        parts: the units.
        parameters: all that are trained, wherever they are.
        run: the model's forward, given a micro-batch.
        batch: a micro-batch: input_ids [rows, tokens], and whatever goes with them.

    Returns:
        None where rows cannot be cut, or the model does not run on zeros.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return None
    rows, tokens = ids.shape
    trained = list(parameters)
    zeros = Buffer(max((p.numel() * p.element_size() for p in trained), default=0))
    area, before = as_tensor(zeros.view), [p.data for p in trained]
    lengths = LENGTHS if tokens > SHORT else (tokens,)
    try:
        with torch.random.fork_rng(devices=[]):
            for p in trained:
                p.data = area[: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
            found = [_tried(parts, run, _cut(batch, tokens, length)) for length in lengths]
    except (RuntimeError, ValueError, IndexError, TypeError):  # a model that wants other rows, or other weights
        return None
    finally:
        for p, data in zip(trained, before, strict=True):
            p.data = data
        zeros.close()
    result = {}
    for name in found[0]:
        graph, waits, outputs = (
            rows * _extrapolated(lengths, [seen[name][k] for seen in found], tokens) for k in range(3)
        )
        own = [(p.numel(), p.element_size()) for p in parts[name].parameters.values()]
        result[name] = Needs(
            graph=graph, waits=waits, outputs=outputs, gradients=sum(n * size for n, size in own),
            scratch=4 * max((n for n, _ in own), default=0), sums=4 * sum(n for n, _ in own),
        )  # fmt: skip
    return result


def _cut(batch: Mapping[str, Any], tokens: int, length: int) -> dict[str, Any]:
    """The first row of a micro-batch, and of it the first tokens."""
    cut = {}
    for name, value in batch.items():
        is_rows = isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] == tokens
        cut[name] = value[:1, :length] if is_rows else value
    return cut


def _extrapolated(lengths: Sequence[int], values: Sequence[int], tokens: int) -> int:
    """The polynomial through these points (Lagrange's), at another one."""
    total = 0.0
    for k, (at, value) in enumerate(zip(lengths, values, strict=True)):
        factor = 1.0
        for other in (*lengths[:k], *lengths[k + 1 :]):
            factor *= (tokens - other) / (at - other)
        total += value * factor
    return max(0, round(total))


def _tried(
    parts: Mapping[str, Part], run: Callable[[Mapping[str, Any]], None], batch: Mapping[str, Any]
) -> dict[str, tuple[int, int, int]]:
    """Graph, what waits, and outputs of every unit, in bytes."""
    found: dict[str, tuple[int, int, int]] = {}
    kinds: dict[Hashable, tuple[tuple[int, int, int], Any]] = {}
    own = {name: part.module.__dict__.get("forward") for name, part in parts.items()}

    def stand_in(part: Part) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kind = _kind(part)
            if kind not in kinds:
                kinds[kind] = _weighed(part, args, kwargs)
            found[part.name], result = kinds[kind]
            return result

        return forward

    try:
        for part in parts.values():
            part.module.forward = stand_in(part)  # type: ignore[method-assign]
        with torch.enable_grad():
            run(batch)
    finally:
        for name, part in parts.items():
            part.module.__dict__.pop("forward", None)
            if own[name] is not None:
                part.module.forward = own[name]  # type: ignore[method-assign]
    return found


def _kind(part: Part) -> Hashable:
    """Units of one kind take the same: one class, the same parameters, the same attention."""
    short = tuple((n.rpartition(".")[2], p.shape, p.dtype) for n, p in part.parameters.items())
    return type(part.module), short, getattr(part.module, "attention_type", None)


def _weighed(part: Part, args: Any, kwargs: Any) -> tuple[tuple[int, int, int], Any]:
    """One forward of a unit: what it takes, and its result without a graph."""
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    leaves = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    ]
    args, kwargs = tree_unflatten(leaves, spec)
    seen = {p.untyped_storage().data_ptr() for p in part.parameters.values()}
    seen |= {t.untyped_storage().data_ptr() for t in inputs}
    graph, held = 0, []

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal graph
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(storage)  # else another tensor might be given its address
            graph += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
        result = part.forward(*args, **kwargs)
    given, spec = tree_flatten(result)
    outputs = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    freed = [
        leaf.detach().requires_grad_(leaf.is_floating_point()) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in given
    ]
    waits = sum(t.untyped_storage().nbytes() for t in inputs if t.requires_grad)
    weight = (graph, waits, sum(t.untyped_storage().nbytes() for t in outputs if t.is_floating_point()))
    return weight, tree_unflatten(freed, spec)
