"""A step of a model of two blocks, timed unit by unit: what computing takes of a model that nobody has probed.

Rates of another model's products say little of small blocks: those spend their time between products. So the model's
own architecture runs with random weights, as training runs it (`runtime/backprop.py`), with few tokens. What a unit
takes with more of them is what it took by the ratio of its prices.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from offload.checkpoint.skeleton import build
from offload.finetune.pricing import BACKWARD, FORWARD, Batch, kind_of, visits
from offload.kernels.chosen import Kernels
from offload.kernels.reference.directions import Along, Sides
from offload.profile import Curve, OpTable, Profile
from offload.runtime.backprop import Backprop, Gradients
from offload.runtime.discovery import Anatomy, dissect
from offload.specs import ModelSpec, UnitSpec

LAYERS = 2  # the first block's inputs may need no gradient
TOKENS = 512  # that are enough for products to be as fast as they get
ROUNDS = 3  # the first makes kernels
AT_ONCE = 2  # micro-batches: where there are several their threads take turns, and each touches new memory
LOSSES = 0.5  # of logits in two and in four bytes, and their gradient
MOST_S = 0.7  # of a round as it is priced: products of such models are long, and rates of others fit them
MOST_MEMORY = 1 / 8  # of the budget
TABLE = "(table)"
NOISE = 1 << 16  # random numbers, which weights repeat
MOVED = 1 << 21  # weights that are moved, to see how long that takes
DIRECTIONS = 1, 2, 8
NOTE = "a timed step of two of its blocks"
MODEL_ERRORS = AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError

Now = Callable[[], float]


def with_small_step(
    profile: Profile,
    spec: ModelSpec,
    read_config: Callable[[], Any],
    batch: Batch,
    *,
    method: Literal["full", "lora", "zo"],
    budget: int,
    adapt: Callable[[nn.Module], Any] | None = None,
    now: Now = time.perf_counter,
) -> Profile:
    """The same machine with tables of what this model's units take of this batch; as it is, where the model is too
    large for that, has experts (which ones random rows choose says nothing), or does not run with two blocks.

    Args:
        spec: the model, without adapters.
        read_config: gives transformers' configuration of it.
        batch: of a step.
        method: of fine-tuning.
        budget: bytes for the whole process.
        adapt: adds adapters to the small model, and freezes all else.
        now: a clock.
    """
    tokens = min(batch.tokens, TOKENS)
    small = Batch(rows=max(1, min(batch.rows, TOKENS // tokens)), tokens=tokens)
    learns = method != "zo"
    count = min(AT_ONCE, batch.micro_batches * (1 if learns else 2))  # without a backward pass there are two sides
    priced = visits(spec, profile, small, "cpu", learns=learns)
    units = list({_key(u): u for u in spec.units}.values())
    seconds = sum((1 + u.layers) * (1 + 3 * learns) * priced[u.name].seconds for u in units)
    itemsize = getattr(torch, spec.dtype).itemsize if hasattr(torch, spec.dtype) else 0
    loose = sum(t.elements for t in spec.loose)
    elements = loose + sum((1 + u.layers) * sum(t.elements for t in u.tensors) for u in units)
    nbytes = 2 * elements * itemsize + int(LOSSES * small.count * spec.logits_nbytes)
    has_experts = any(t.experts for u in units for t in u.tensors)
    if not itemsize or has_experts or seconds > MOST_S or nbytes > MOST_MEMORY * budget:
        return profile
    try:
        with torch.random.fork_rng(devices=[]):
            names = [u.name for u in spec.units]
            spent = _timed(
                read_config(),
                getattr(torch, spec.dtype),
                names,
                replace(small, micro_batches=count),
                method,
                adapt,
                now,
            )
    except MODEL_ERRORS:  # a model that wants more than two blocks, or other inputs
        return profile
    whole = visits(spec, profile, replace(batch, micro_batches=1), "cpu", learns=learns)
    tables: dict[tuple[str, tuple[int, ...]], OpTable] = {}  # of blocks of a kind the last one's stays
    for unit in (u for u in spec.units if u.name in spent):
        ratio = whole[unit.name].seconds / priced[unit.name].seconds
        for op, took in zip((FORWARD, BACKWARD), spent[unit.name], strict=True):
            if took > 0:
                curve, kind = Curve.of([(batch.count, took * ratio)]), kind_of(unit)
                tables[op, kind] = _table(op, spec.dtype, kind, "rows", curve)
    found = list(tables.values())
    if method == "zo":
        found += _moving(spec.dtype, now)
    return replace(profile, ops=(*found, *profile.ops), notes=(*profile.notes, NOTE))


def _key(unit: UnitSpec) -> tuple[int, ...] | str:
    return kind_of(unit) if unit.layers else unit.name


def _table(op: str, dtype: str, shape: tuple[int, ...], over: Any, curve: Curve) -> OpTable:
    by = "cpu" if op == "move_along" else "torch"
    return OpTable(op=op, implementation=by, processor="cpu", format=dtype, shape=shape, over=over, curve=curve)


@dataclass
class _Watch:
    """Owns weights that are always there, and notes how long each unit was entered."""

    now: Now
    began: float = 0.0
    spent: dict[tuple[str, bool], float] = field(default_factory=dict)

    def enter(self, unit: str, *, is_backward: bool) -> None:
        self.began = self.now()

    def visit(self, unit: str, number: int) -> None:
        pass

    def add(self, unit: str, gradients: Gradients) -> None:
        pass

    def leave(self, unit: str, *, is_backward: bool) -> None:
        took = self.now() - self.began
        self.spent[unit, is_backward] = min(took, self.spent.get((unit, is_backward), took))


def _timed(
    config: Any,
    dtype: torch.dtype,
    names: Sequence[str],
    batch: Batch,
    method: str,
    adapt: Callable[[nn.Module], Any] | None,
    now: Now,
) -> dict[str, tuple[float, float]]:
    """Unit -> seconds of its forward, and of its backward alone, of a micro-batch; 0 where it has none.

    Args:
        names: of all units of the model, in their order; few are here.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    layers = min(LAYERS, text.num_hidden_layers)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[-layers:]
    model = build(config, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(method != "zo")
    if adapt is not None:
        adapt(model)
    anatomy = dissect(model, shares=False)
    _fill(anatomy)
    modules = dict(model.named_modules())
    parts = [(name, modules[name]) for name in names if name in modules]
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    if all(module is not table for _, module in parts):  # a tied one is no unit of the plan, nor does it cost nothing
        parts.insert(0, (TABLE, table))
    ids = torch.arange(batch.count).view(batch.rows, batch.tokens) % text.vocab_size
    watch, count = _Watch(now), batch.micro_batches
    backprop = Backprop(model, parts, watch)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    try:
        for step in range(ROUNDS if count == 1 else ROUNDS - 1):
            if step == 1:
                watch.spent.clear()
            backprop.run([loss] * count, None, step)
            if method != "zo":
                backprop.run([loss] * count, [1.0 / count] * count, step)
    finally:
        backprop.close()
    found = {}
    for name, _ in parts:
        forward_s, back_s = (watch.spent.get((name, is_backward), 0.0) / count for is_backward in (False, True))
        found[name] = forward_s, max(0.0, back_s - forward_s)  # the backward of a unit runs it again
    if TABLE in found:
        (ahead, behind), (forward_s, back_s) = found.pop(TABLE), found[names[-1]]
        found[names[-1]] = forward_s + ahead, back_s + behind
    return found


def _fill(anatomy: Anatomy) -> None:
    """Parameters on meta become random ones."""
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)) * 0.02
    for places in anatomy.owners.values():
        old = places[0].module._parameters[places[0].attribute]
        assert old is not None
        data = noise.to(old.dtype).repeat(-(-old.numel() // NOISE))[: old.numel()].view(old.shape)
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        for place in places:
            place.module._parameters[place.attribute] = new


def _moving(dtype: str, now: Now) -> list[OpTable]:
    """What moving weights takes, by the number of directions."""
    kernels, some = Kernels("cpu", exact=False), torch.zeros(MOVED, dtype=getattr(torch, dtype))
    sides, tables = Sides(1, 1e-3, some.clone(), some.clone()), []
    for count in DIRECTIONS:
        due, seconds = [(k + 1, 1e-6) for k in range(count - 1)], []
        for _ in range(ROUNDS):
            began = now()
            kernels.run("move_along", some, Along(0, ""), due, some, sides)
            seconds.append(now() - began)
        tables.append(_table("move_along", dtype, (count,), "params", Curve.of([(MOVED, min(seconds[1:]))])))
    return tables
