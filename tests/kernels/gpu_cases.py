"""What each Triton kernel is tested on: arguments at odd shapes, exact results, and how far it may be from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from offload.kernels import reference
from offload.kernels.formats.int4 import dequantize_int4, quantize_int4
from offload.kernels.formats.int8 import quantize_int8
from offload.kernels.formats.lossless import pack_lossless
from offload.kernels.reference import AdamW

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        label: what is special about it.
        arguments: makes them anew, in main memory.
        options: what is given by name.
        exact: from the arguments, what `results` must be near: float64, or of the results' dtype to be equal to.
        results: from the function and the arguments, all tensors that it returns or changes.
        roundings, sums: see kernel_errors.assert_near.
    """

    op: str
    label: str
    arguments: Callable[[], tuple[Any, ...]]
    exact: Callable[..., list[torch.Tensor]]
    results: Callable[..., list[torch.Tensor]] = lambda function, *given: [function(*given)]
    options: Mapping[str, Any] = field(default_factory=dict)
    roundings: float = 1
    sums: int = 0


def moved(value: Any, place: str) -> Any:
    """A copy on a device of tensors and of whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.clone().to(place)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: moved(getattr(value, part.name), place) for part in fields(value)})
    if isinstance(value, Mapping):
        return {name: moved(part, place) for name, part in value.items()}
    return value


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _attention()
    yield from _linears()
    yield from _lossless()
    yield from _adamw()
    yield from _gathers()


# rows, outputs, inputs: one and few rows, tensor cores, more rows than a tile; parts; inputs that fill no chunk or word
SHAPES = ((1, 9, 640), (2, 33, 40), (3, 17, 576), (4, 5, 256), (5, 70, 200), (18, 3, 130))


def _linears() -> Iterator[Case]:
    def int8(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> list[torch.Tensor]:
        return [_linear(x, weight.q.double() * weight.scale[:, None].double(), bias)]

    def int4(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> list[torch.Tensor]:
        return [_linear(x, dequantize_int4(weight).double(), bias)]

    for shape in SHAPES:
        for dtype in DTYPES:
            given = _linear_arguments(*shape, dtype, quantize_int8, bias=shape[1] % 2 == 1)
            yield Case("linear_int8", f"{shape} {dtype}", given, int8, sums=64 * shape[2])
    for k, shape in enumerate(SHAPES):
        for j, (group, symmetric) in enumerate((g, s) for g in (32, 64, 128) for s in (True, False)):
            dtype = DTYPES[(k + j) % 3]

            def pack(weight: torch.Tensor, group: int = group, symmetric: bool = symmetric) -> Any:
                return quantize_int4(weight, group, symmetric=symmetric)

            given = _linear_arguments(*shape, dtype, pack, bias=j % 2 == 1)
            label = f"{shape} {dtype} groups of {group}{'' if symmetric else ', offsets'}"
            # the reference's weights are rounded to float32; the kernel's are not
            yield Case("linear_int4", label, given, int4, sums=256 * shape[2])


def _linear_arguments(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, pack: Callable[[torch.Tensor], Any], *, bias: bool
) -> Callable[[], tuple[Any, ...]]:
    def arguments() -> tuple[Any, ...]:
        x, weight = torch.randn(rows, inputs).to(dtype), pack(torch.randn(outputs, inputs) / inputs**0.5)
        return x, weight, torch.randn(outputs).to(dtype) if bias else None

    return arguments


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x.double(), weight, None if bias is None else bias.double())


def _lossless() -> Iterator[Case]:
    def matrix(outputs: int, inputs: int, kind: str) -> torch.Tensor:
        if kind == "any bits":
            return torch.randint(-(2**15), 2**15, (outputs, inputs)).to(torch.int16).view(torch.bfloat16)
        weight = torch.randn(outputs, inputs)
        return (weight * torch.exp(4 * torch.randn_like(weight)) if kind == "wide" else weight).bfloat16()

    def unpacked(function: Callable[..., torch.Tensor], *given: Any) -> list[torch.Tensor]:
        return [function(*given).view(torch.int16)]  # as bits: not-a-number equals nothing

    for shape in ((1, 1), (3, 64), (5, 70), (2, 4500)):
        for kind in ("normal", "wide", "any bits"):

            def arguments(shape: tuple[int, int] = shape, kind: str = kind) -> tuple[Any, ...]:
                return (pack_lossless(matrix(*shape, kind)),)

            def exact(weight: Any) -> list[torch.Tensor]:
                return [reference.unpack_lossless(weight).view(torch.int16)]

            yield Case("unpack_lossless", f"{shape} {kind}", arguments, exact, unpacked)
    for rows in (1, 7):
        given = _linear_arguments(rows, 33, 70, torch.bfloat16, lambda w: pack_lossless(w.bfloat16()), bias=rows > 1)

        def product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> list[torch.Tensor]:
            return [_linear(x, reference.unpack_lossless(weight).double(), bias)]

        yield Case("linear_lossless", f"{rows} rows", given, product, sums=64 * 70)


def _adamw() -> Iterator[Case]:
    def stepped(function: Callable[..., float], *given: Any) -> list[torch.Tensor]:
        squares = function(*given)
        return [torch.tensor(squares, dtype=torch.float32), *(t for t in given if isinstance(t, torch.Tensor))]

    def exact(*given: Any) -> list[torch.Tensor]:
        copies = [moved(value, "cpu") for value in given]
        return [t.double() for t in stepped(reference.adamw_step, *copies)]

    for count in (1, 1000, 2500):
        for dtype, writes in ((torch.bfloat16, True), (torch.float32, False), (torch.float32, True)):

            def arguments(count: int = count, dtype: torch.dtype = dtype, writes: bool = writes) -> tuple[Any, ...]:
                states = torch.randn(count), torch.randn(count) * 0.1, torch.rand(count) * 0.01
                weight = torch.empty(count, dtype=torch.bfloat16) if writes else None
                return *states, torch.randn(count).to(dtype), weight, AdamW(lr=3e-3, step=7, grad_scale=0.3)

            label = f"{count} {dtype}{', weight' * writes}"
            yield Case("adamw_step", label, arguments, exact, stepped, roundings=32)


def _attention() -> Iterator[Case]:
    def both(function: Callable[..., Any], *given: Any, **options: Any) -> list[torch.Tensor]:
        out, lse = function(*given, **options)
        return [out, lse.exp()]  # so that a row which sees nothing is a number

    def exact(*given: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        return [t.double() for t in both(reference.decode_attention, *(t.double() for t in given), **options)]

    bf16, fp16, fp32 = DTYPES
    bounds = {"first": torch.tensor([3, 0, 9]), "length": torch.tensor([40, 7, 9])}
    for shape, of_q, of_kv, options in (  # batch, heads, kv heads, queries (or 0), tokens, head dimension
        ((1, 1, 1, 0, 1, 16), fp32, fp32, {}),
        ((2, 6, 2, 0, 70, 64), bf16, bf16, {}),
        ((1, 4, 1, 0, 300, 40), fp32, bf16, {"softcap": 5.0}),
        ((1, 4, 2, 0, 600, 16), fp16, fp16, {"window": 100}),
        ((3, 4, 2, 0, 50, 24), bf16, fp32, {**bounds, "window": 5}),
        ((3, 2, 1, 3, 50, 16), fp32, fp16, {**bounds, "softcap": 30.0}),
        ((1, 18, 1, 2, 270, 16), bf16, bf16, {"window": 3}),
    ):

        def arguments(
            shape: tuple[int, ...] = shape,
            of_q: torch.dtype = of_q,
            of_kv: torch.dtype = of_kv,
        ) -> tuple[Any, ...]:
            batch, heads, kv_heads, queries, tokens, dim = shape
            q = torch.randn(batch, heads, *([queries] if queries else []), dim).to(of_q)
            k, v = (torch.randn(batch, tokens, kv_heads, dim).to(of_kv).transpose(1, 2) for _ in range(2))
            return q, k, v

        label = f"{shape} {of_q} over {of_kv} {' '.join(options)}"
        options = {"scale": shape[-1] ** -0.5, **options}
        roundings = 64 if of_q == fp32 else 1  # as many as a score is large
        yield Case("decode_attention", label, arguments, exact, both, options, roundings=roundings, sums=4096)


def _gathers() -> Iterator[Case]:
    def exact(pool: torch.Tensor, table: torch.Tensor) -> list[torch.Tensor]:
        return [reference.gather_pages(pool, table)]

    pools = (
        ("pages of bf16", lambda: torch.randn(7, 16, 2, 24).bfloat16(), torch.int32),
        ("rows of float32", lambda: torch.randn(9, 33), torch.int64),
        ("odd bytes", lambda: torch.randint(0, 255, (5, 3, 7), dtype=torch.uint8), torch.int64),
        ("long rows", lambda: torch.randn(3, 5000), torch.int32),
    )
    for label, pool, index in pools:

        def arguments(pool: Callable[[], torch.Tensor] = pool, index: torch.dtype = index) -> tuple[Any, ...]:
            made = pool()
            return made, torch.randint(0, len(made), (6,)).to(index)

        yield Case("gather_pages", label, arguments, exact)
