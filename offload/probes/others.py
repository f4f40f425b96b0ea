"""What the ops beside products take: attention over a cache, optimizer steps, norms and rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from offload.kernels import OPS, choose
from offload.kernels.formats.dynamic8 import zeros_dynamic8
from offload.kernels.reference import AdamW
from offload.probes.area import Area
from offload.probes.sampling import Meter
from offload.probes.tables import curve_of, table_of
from offload.profile import Curve, OpTable

_STATES = 16  # bytes of a parameter: master weight and two moments in float32, gradient and weight in bf16


def attention_tables(
    heads: tuple[int, int, int], dtype: torch.dtype, tokens: Sequence[int], area: Area, meter: Meter
) -> Iterator[OpTable]:
    """One new token of one sequence over its keys and values, by the kernel; what torch does is measured in a block."""
    query_heads, kv_heads, dim = heads
    choice = choose("decode_attention", meter.device)
    if choice.implementation == "torch":
        return
    q = torch.full((1, query_heads, 1, dim), 0.5, dtype=dtype, device=meter.device)
    points = []
    for count in tokens:
        caches = area.copies((2, 1, kv_heads, count, dim), dtype)
        if not caches or choice.refuses()(q, *caches[0], scale=dim**-0.5) is not None:
            continue
        runs = (partial(choice.function(), q, cache[0], cache[1], scale=dim**-0.5) for cache in caches)
        sample = meter.time(*runs)
        points.append((caches[0].nbytes, sample.seconds, sample.spread))
    if points:
        yield table_of(
            "decode_attention", choice.implementation, str(dtype)[6:], heads, Curve.of(points), meter, "bytes"
        )


def optimizer_tables(params: Sequence[int], area: Area, meter: Meter) -> Iterator[OpTable]:
    """AdamW with moments in float32 and in 8 bits; gradients and weights in bf16. The area's numbers change."""
    for op in ("adamw_step", "adamw_step_8bit"):
        choice = choose(op, meter.device)
        points = []
        for count in params:
            if count * _STATES > area.nbytes or (op == "adamw_step_8bit" and meter.device != "cpu"):
                continue
            with torch.no_grad():
                sample = meter.time(*steps(count, area, op, meter.device))
            points.append((count, sample.seconds, sample.spread))
        if points:
            yield table_of(op, choice.implementation, "bfloat16", (), Curve.of(points), meter, "params")
    area.fill()


def steps(count: int, area: Area, op: str = "adamw_step", device: str = "cpu") -> list[Callable[[], object]]:
    """Calls of an optimizer's step, each for `count` parameters of their own."""
    function, numbers = choose(op, device).function(), AdamW(lr=1e-6, step=3)
    parts = area.carve(count * _STATES, lambda run: run)
    return [partial(function, *_states(part, count, op), numbers) for part in parts]


def _states(part: torch.Tensor, count: int, op: str) -> tuple[object, ...]:
    """Master weight, moments, gradient and 16-bit weight, one behind the other."""
    floats = part[: 12 * count].view(torch.float32).view(3, count)
    halves = part[12 * count :].view(torch.bfloat16).view(2, count)
    if op == "adamw_step":
        return floats[0], floats[1], floats[2], halves[0], halves[1]
    moments = (zeros_dynamic8(count, signed=signed) for signed in (True, False))
    return floats[0], *moments, halves[0], halves[1]


def small_tables(
    hidden: int, heads: tuple[int, int, int] | None, dtype: torch.dtype, rows: Sequence[int], meter: Meter
) -> Iterator[OpTable]:
    """RMS norm and rotary embedding, which lie in a cache while they run."""
    made = {"dtype": dtype, "device": meter.device}
    weight = torch.ones(hidden, **made)  # type: ignore[call-overload]
    norms = [(n, (torch.ones(n, hidden, **made), weight, 1e-6)) for n in rows]  # type: ignore[call-overload]
    cases = [("rms_norm", (hidden,), norms)]
    if heads is not None:
        turns = []
        for n in rows:
            q, k = (torch.ones(1, count, n, heads[2], **made) for count in heads[:2])  # type: ignore[call-overload]
            angles = torch.ones(1, n, heads[2], **made)  # type: ignore[call-overload]
            turns.append((n, (q, k, angles, angles)))
        cases.append(("rotary", heads, turns))  # type: ignore[arg-type]
    for op, shape, calls in cases:
        for implementation in dict.fromkeys((choose(op, meter.device).implementation, "torch")):
            choice = choose(op, meter.device, forced=implementation)
            if implementation not in ("torch", *OPS[op]) or choice.refuses()(*calls[0][1]) is not None:
                continue
            run, arguments = choice.function(), dict(calls)
            curve = curve_of(arguments, lambda n, run=run, given=arguments: [partial(run, *given[n])], meter)  # type: ignore[misc]
            yield table_of(op, implementation, str(dtype)[6:], shape, curve, meter)
