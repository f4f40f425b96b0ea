"""The Triton kernels beside torch's own ops and the bandwidth of a GPU's memory.

    python benchmarks/gpu_kernels.py                 # under three minutes
    python benchmarks/gpu_kernels.py --only int4

A pass goes over enough different matrices that no cache helps, is captured in a CUDA graph, so that launches from
Python do not count, and is timed by the GPU's own clock. A kernel's bandwidth counts the bytes that it must move at
least. The bound is a copy within the GPU's memory, counted at 2 bytes a byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, hardware, machine_line, number, table, write

SHAPES = ((8192, 3072), (28672, 8192))  # outputs and inputs: feed-forward of a 3B Llama, and of a 70B
AREA = 512 << 20  # bytes of weights in a pass, ten times an H100's cache
LEAST_S = 0.02  # a pass is repeated for so long in each round


@dataclass(frozen=True)
class Case:
    """One thing to time: `run` moves `nbytes` at the least; `peer` does the same with torch, on plain weights."""

    name: str
    nbytes: int
    run: Callable[[], Any]
    peer: Callable[[], Any] | None = None


def cases(only: str) -> list[Callable[[], Case]]:
    """All whose name contains `only`, to be made one at a time: together they would not fit."""
    found: dict[str, Callable[[], Case]] = {"copy": _copy}
    for shape in SHAPES:
        size = f"{shape[0]} x {shape[1]}"
        for rows in (1, 2, 4, 16, 64):
            found[f"linear_int8, {size}, rows {rows}"] = lambda s=shape, r=rows: _linear("linear_int8", s, r)
            for group, symmetric in ((32, True), (32, False), (64, True), (128, True)):
                name = f"linear_int4, groups of {group}{'' if symmetric else ', offsets'}, {size}, rows {rows}"
                kind = {"group": group, "symmetric": symmetric}
                found[name] = lambda s=shape, r=rows, k=kind: _linear("linear_int4", s, r, **k)
    found["adamw_step"] = _adamw
    for batch, tokens in ((1, 32 << 10), (16, 4 << 10)):
        found[f"decode_attention, {batch} x {tokens} tokens"] = lambda b=batch, t=tokens: _attention(b, t)
    found["unpack_lossless"] = _unpack
    found["gather_pages"] = _gather
    chosen = {name: make for name, make in found.items() if only in name or name == "copy"}
    return [lambda name=name, make=make: replace(make(), name=name) for name, make in chosen.items()]


def _op(name: str) -> Callable[..., Any]:
    from offload.kernels import choose

    return choose(name, "cuda", forced="gpu").function()


def _copy() -> Case:
    import torch

    area = torch.ones(AREA, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(area)
    return Case("", 2 * AREA, lambda: other.copy_(area))


def _linear(name: str, shape: tuple[int, int], rows: int, **kind: Any) -> Case:
    """Products with as many copies of a packed matrix as fill AREA; torch's with a plain one, in as many bytes."""
    import torch
    from torch.nn import functional

    from offload.kernels.formats.int4 import quantize_int4
    from offload.kernels.formats.int8 import quantize_int8

    plain = torch.randn(shape, device="cuda") / shape[1] ** 0.5
    weight = quantize_int8(plain) if name == "linear_int8" else quantize_int4(plain, **kind)
    plain = plain.bfloat16()
    count = max(2, AREA // weight.nbytes)
    copies = [_copied(weight) for _ in range(count)]
    plains = [plain.clone() for _ in range(max(2, AREA // plain.nbytes))]
    order = [plains[i % len(plains)] for i in range(count)]
    x, function = torch.randn(rows, shape[1], device="cuda").bfloat16(), _op(name)
    return Case(
        "",
        count * weight.nbytes,
        lambda: [function(x, one) for one in copies],
        lambda: [functional.linear(x, one) for one in order],
    )


def _copied(weight: Any) -> Any:
    import torch

    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{k: v.clone() for k, v in parts.items() if isinstance(v, torch.Tensor)})


def _adamw() -> Case:
    import torch

    from offload.kernels.gpu.adamw_step import enqueue
    from offload.kernels.reference import AdamW

    count = 64 << 20
    master, mean, square = torch.randn(count, device="cuda"), *torch.zeros(2, count, device="cuda").unbind()
    grad, weight = torch.randn(count, device="cuda").bfloat16(), torch.empty(count, device="cuda").bfloat16()
    parameter = torch.nn.Parameter(master.clone())
    parameter.grad = grad.float()
    peer = torch.optim.AdamW([parameter], lr=1e-3, fused=True, capturable=True)
    numbers = AdamW(lr=1e-3, step=3)
    return Case("", 30 * count, lambda: enqueue(master, mean, square, grad, weight, numbers), peer.step)


def _attention(batch: int, tokens: int) -> Case:
    import torch
    from torch.nn import functional

    function = _op("decode_attention")
    pairs = [torch.randn(2, batch, 8, tokens, 128, device="cuda").bfloat16() for _ in range(2)]
    q = torch.randn(batch, 32, 128, device="cuda").bfloat16()

    def peer() -> None:
        for k, v in pairs:
            functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    nbytes = sum(pair.nbytes for pair in pairs)
    return Case("", nbytes, lambda: [function(q, k, v, scale=128**-0.5) for k, v in pairs], peer)


def _unpack() -> Case:
    """Counted: 12 bits read and 16 written for each weight."""
    import torch

    from offload.kernels.formats.lossless import pack_lossless

    packed = pack_lossless((torch.randn(SHAPES[1]) / 90).bfloat16())
    there = replace(packed, **{k: v.cuda() for k, v in vars(packed).items() if isinstance(v, torch.Tensor)})
    out = torch.empty(SHAPES[1], dtype=torch.bfloat16, device="cuda")
    function = _op("unpack_lossless")
    return Case("", there.nbytes + out.nbytes, lambda: function(there, out))


def _gather() -> Case:
    import torch

    function = _op("gather_pages")
    pool = torch.randn(8192, 16, 8, 128, device="cuda").bfloat16()  # pages of 16 tokens
    table = torch.randperm(len(pool), device="cuda")
    out = torch.empty_like(pool)
    return Case(
        "", 2 * pool.nbytes, lambda: function(pool, table, out), lambda: torch.index_select(pool, 0, table, out=out)
    )


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of one pass: the median over rounds of replays of its graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()

    def passes(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    passes(2)
    count = max(2, int(LEAST_S / max(1e-6, passes(2))))
    return median(passes(count) for _ in range(rounds))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--only", default="", help="cases whose name contains this")
    ap.add_argument("--out", type=Path, default=RESULTS)
    a = ap.parse_args()
    import torch

    from offload.hardware import versions

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; nothing to measure")
    torch.manual_seed(0)
    lines: list[dict[str, Any]] = []
    with torch.no_grad():
        for make in cases(a.only):
            case = make()
            own = seconds(case.run, a.rounds)
            peer = seconds(case.peer, a.rounds) if case.peer else None
            lines.append({"op": case.name, "nbytes": case.nbytes, "seconds": own, "torch_seconds": peer})
            print(f"{case.name}: {case.nbytes / own / 1e9:.0f} GB/s", flush=True)
            del case
            torch.cuda.empty_cache()
    bound = lines[0]["nbytes"] / lines[0]["seconds"]
    rows = []
    for line in lines:
        own, peer = line["seconds"], line["torch_seconds"]
        times = number(peer / own) if peer else ""
        rate = line["nbytes"] / own
        rows.append([line["op"], number(1e6 * own), number(rate, scale=1e9), times, number(rate / bound, digits=2)])
    facts = hardware()
    page = (
        f"# GPU kernels, {date.today()}\n\n{machine_line(facts)}. bf16 activations; medians of {a.rounds} rounds of "
        f"replayed graphs.\n\n" + table(["op", "us a pass", "GB/s", "times torch", "of the bound"], rows)
    )
    print(page)
    write("kernels-gpu", {"hardware": facts, "versions": versions(), "lines": lines}, page, a.out)


if __name__ == "__main__":
    main()
