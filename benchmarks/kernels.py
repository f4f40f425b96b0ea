"""The CPU kernels beside torch's own ops and the bandwidth of memory, in one interleaved loop.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --docs     # and writes the table in docs/kernels.md anew
    python benchmarks/kernels.py --only adamw --deepspeed-python VENV/bin/python

Weights lie in huge pages, as under offload, and every pass goes over several hundred megabytes of them, so that no
cache helps. A kernel's bandwidth counts the bytes that it must move at least: packed weights, or 16 bytes for a
parameter of AdamW with moments in 8 bits, or 30 with moments in float32 (2 of which a plain store of the 16-bit weight
would fetch). --deepspeed-python runs DeepSpeedCPUAdam in turn with it, in a process of another environment's Python.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, ROOT, hardware, machine_line, number, put_between, table, write

SHAPE = 8192, 3072  # a matrix of a 3B Llama's feed-forward
AREA = 768 << 20  # bytes of weights in a pass


@dataclass(frozen=True)
class Case:
    """One thing to time: `run` goes over `nbytes`; `peer` does the same with torch."""

    name: str
    file: str
    nbytes: int
    run: Callable[[], Any]
    peer: Callable[[], Any] | None = None
    bound: str = "read"
    others: Mapping[str, Callable[[], Any]] = field(default_factory=dict)  # further peers, by name
    parameters: int = 0  # of an optimizer's step


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rounds", type=int, default=7)
    ap.add_argument("--only", default="", help="cases whose name contains this")
    ap.add_argument("--deepspeed-python", type=Path, help="Python of an environment with torch and DeepSpeed")
    ap.add_argument("--docs", action="store_true", help="put the table into docs/kernels.md")
    ap.add_argument("--out", type=Path, default=RESULTS)
    return ap.parse_args()


def cases(deepspeed: Path | None) -> list[Case]:
    """All of them; they share one area of memory for weights."""
    import torch
    from torch.nn import functional

    from offload.io.buffers import Buffer
    from offload.kernels import choose
    from offload.kernels.cpu import bandwidth
    from offload.kernels.formats.int4 import quantize_int4
    from offload.kernels.formats.int8 import quantize_int8
    from offload.kernels.formats.lossless import pack_lossless
    from offload.tiers.host import as_tensor

    torch.manual_seed(0)
    area = as_tensor(Buffer(AREA).view).fill_(
        1
    )  # memory that was never written is one page of zeros, read from the cache
    other = as_tensor(Buffer(AREA).view).fill_(1)
    outputs, inputs = SHAPE

    lent = Lent(area)

    found = [
        Case("read", "bandwidth.py", AREA, lambda: bandwidth.read(area)),
        Case("copy", "bandwidth.py", 2 * AREA, lambda: bandwidth.copy(other, area), lambda: other.copy_(area), "copy"),
    ]
    plain = torch.randn(outputs, inputs) / inputs**0.5

    def linears(dtype: torch.dtype, rows: int) -> Case:
        function = choose("linear", "cpu", forced="cpu").function()
        x = torch.randn(rows, inputs).to(dtype)
        stored = plain.to(dtype)
        count = AREA // stored.nbytes

        def over(op: Callable[..., Any]) -> Callable[[], None]:
            def run() -> None:
                for weight in lent.to(dtype, lambda place: [place(stored) for _ in range(count)]):
                    op(x, weight)

            return run

        name = f"linear, {str(dtype)[6:]}, {rows} row{'s' * (rows > 1)}"
        return Case(name, "linear.py", count * stored.nbytes, over(function), over(functional.linear))

    found += [linears(torch.bfloat16, rows) for rows in (1, 2, 4, 8, 16)]
    found += [linears(torch.float16, 1), linears(torch.float32, 1)]

    x = torch.randn(1, inputs).bfloat16()

    def packed(name: str, op: str, weight: Any, total: int) -> Case:
        """Products with enough copies of a packed matrix to fill `total` bytes."""
        function, count = choose(op, "cpu", forced="cpu").function(), total // weight.nbytes

        def run() -> None:
            for one in lent.to(name, lambda place: [placed(weight, place) for _ in range(count)]):
                function(x, one)

        return Case(name, f"{op}.py", count * weight.nbytes, run)

    found.append(packed("linear, int8, 1 row", "linear_int8", quantize_int8(plain), AREA // 2))
    for group, symmetric in ((32, False), (32, True), (64, True), (128, True)):
        four = quantize_int4(plain, group, symmetric=symmetric)
        kind = "" if symmetric else ", asymmetric"
        found.append(packed(f"linear, int4, groups of {group}{kind}, 1 row", "linear_int4", four, AREA // 4))
    twelve = pack_lossless(plain.bfloat16())
    found.append(packed("linear, lossless, 1 row", "linear_lossless", twelve, AREA))
    unpack = choose("unpack_lossless", "cpu", forced="cpu").function()
    out = other[: plain.numel() * 2].view(torch.bfloat16).view(SHAPE)
    name, count = "unpack lossless to bf16, read and written", AREA // twelve.nbytes

    def unpack_all() -> None:
        for one in lent.to(name, lambda place: [placed(twelve, place) for _ in range(count)]):
            unpack(one, out)

    found.append(Case(name, "unpack_lossless.py", count * (twelve.nbytes + out.nbytes), unpack_all))
    found += packers()
    found += attention(lent)
    return found + adamw(deepspeed)


class Lent:
    """One area of memory that cases use in turn: all meet the same pages, of which some may be slower than others."""

    def __init__(self, area: Any) -> None:
        self._area, self._of, self._what = area, None, None

    def to(self, whom: Any, make: Callable[[Callable[[Any], Any]], Any]) -> Any:
        """What `make` puts there for `whom`; it gets a function that copies a tensor to the next free place."""
        if self._of != whom:
            used = 0

            def place(tensor: Any) -> Any:
                nonlocal used
                start = -(-used // 4096) * 4096
                used = start + tensor.nbytes
                return self._area[start:used].view(tensor.dtype).view(tensor.shape).copy_(tensor)

            self._of, self._what = whom, make(place)
        return self._what


def huge(tensor: Any) -> Any:
    """A copy in huge pages, where offload keeps its tensors."""
    from offload.io.buffers import Buffer
    from offload.tiers.host import as_tensor

    return as_tensor(Buffer(tensor.nbytes).view).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def placed(weight: Any, place: Callable[[Any], Any] = huge) -> Any:
    """A packed weight, all parts of it copied, to huge pages or elsewhere."""
    import torch

    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{k: place(v) for k, v in parts.items() if isinstance(v, torch.Tensor) and v.numel()})


def packers() -> list[Case]:
    """Packing bf16 and unpacking to it. Their bytes are those of the bf16 matrix, which is larger than the caches."""
    import torch

    from offload.kernels import choose

    outputs, inputs = SHAPE
    weight = huge((torch.randn(4 * outputs, inputs) / inputs**0.5).bfloat16())
    out = torch.empty_like(weight)
    found = []
    for name, op, options in (
        ("pack lossless", "pack_lossless", {}),
        ("pack int8", "quantize_int8", {}),
        ("pack int4, groups of 32, asymmetric", "quantize_int4", {"group": 32}),
        ("pack int4, groups of 128", "quantize_int4", {"group": 128, "symmetric": True}),
    ):
        pack = functools.partial(choose(op, "cpu", forced="cpu").function(), weight, **options)
        found.append(Case(name, f"{op}.py", weight.nbytes, pack))
        if op != "pack_lossless":
            back = choose(f"de{op}", "cpu", forced="cpu").function()
            unpack = functools.partial(back, pack(), torch.bfloat16, out)
            found.append(Case(f"un{name} to bf16", f"de{op}.py", weight.nbytes, unpack))
    return found


def attention(lent: Lent) -> list[Case]:
    """One new token of each sequence over a cache: query heads, key heads, and their width, first those of Llama 3."""
    import torch
    from torch.nn import functional

    from offload.kernels import choose

    decode = choose("decode_attention", "cpu", forced="cpu").function()
    found = []
    for dtype, batch, tokens, heads, kv_heads, dim in (
        (torch.bfloat16, 1, 32768, 32, 8, 128),
        (torch.bfloat16, 8, 4096, 32, 8, 128),
        (torch.float32, 1, 16384, 32, 8, 128),
        (torch.bfloat16, 1, 32768, 64, 8, 128),
        (torch.bfloat16, 1, 32768, 32, 8, 64),
        (torch.bfloat16, 1, 32768, 32, 8, 80),
    ):
        q = torch.randn(batch, heads, 1, dim).to(dtype)
        cache = torch.randn(2, batch, kv_heads, tokens, dim).to(dtype)
        shape = f"{str(dtype)[6:]}, {heads} by {kv_heads} heads of {dim}"
        name = f"decode_attention, {shape}, {batch} of {tokens} tokens"

        def over(op: Callable[..., Any], q: Any = q, cache: Any = cache, name: str = name) -> Callable[[], Any]:
            return lambda: op(q, *lent.to(name, lambda place: place(cache)))

        run = over(functools.partial(decode, scale=dim**-0.5))
        peer = over(functools.partial(functional.scaled_dot_product_attention, enable_gqa=True))
        found.append(Case(name, "decode_attention.py", cache.nbytes, run, peer))
    return found


def adamw(deepspeed: Path | None) -> list[Case]:
    """A step with moments in float32 and one with moments in 8 bits, on the same parameters, in turn with peers."""
    import torch

    from offload.kernels import choose
    from offload.kernels.formats.dynamic8 import zeros_dynamic8
    from offload.kernels.reference import AdamW

    count = 32 << 20
    master, mean, square = huge(torch.randn(count)), huge(torch.zeros(count)), huge(torch.zeros(count))
    small = [placed(zeros_dynamic8(count, signed=signed)) for signed in (True, False)]
    grad, weight = huge(torch.randn(count).bfloat16()), huge(torch.empty(count, dtype=torch.bfloat16))
    parameter = torch.nn.Parameter(huge(master))
    parameter.grad = huge(grad.float())
    peer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    peer.step()
    peer.state[parameter] |= {k: huge(v) for k, v in peer.state[parameter].items() if k != "step"}
    steps = {op: choose(op, "cpu", forced="cpu").function() for op in ("adamw_step", "adamw_step_8bit")}
    numbers = AdamW(lr=1e-3, step=3)
    others = {} if deepspeed is None else deepspeed_adam(deepspeed, count)

    def plain() -> None:
        steps["adamw_step"](master, mean, square, grad, weight, numbers)

    def packed() -> None:
        steps["adamw_step_8bit"](master, *small, grad, weight, numbers)

    return [
        Case("adamw_step", "adamw_step.py", 30 * count, plain, peer.step, "copy", others, count),
        Case("adamw_step_8bit", "adamw_step_8bit.py", 16 * count, packed, peer.step, "copy", {}, count),
    ]


def deepspeed_adam(python: Path, count: int) -> dict[str, Callable[[], None]]:
    """Its step without and with a bf16 copy of the weights, by name; in a process that ends with this one."""
    script = Path(__file__).with_name("peer_deepspeed_adam.py")
    process = subprocess.Popen(
        [python, script, "--count", str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None
    name = f"DeepSpeedCPUAdam {json.loads(told.readline())['version']}"

    def step(what: str) -> None:
        asked.write(f"{what}\n")
        asked.flush()
        float(told.readline())

    return {name: lambda: step("step"), f"{name} and copy to bf16": lambda: step("weight")}


def main() -> None:
    a = arguments()
    import torch

    from offload.hardware import versions
    from offload.kernels.cpu import team

    chosen = [c for c in cases(a.deepspeed_python) if a.only in c.name or c.name in ("read", "copy")]
    seconds: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        for turn in range(a.rounds + 1):
            for case in chosen:
                for who, run in (("offload", case.run), ("torch", case.peer), *case.others.items()):
                    if run is None:
                        continue
                    run()  # fills, compiles, warms
                    began = time.perf_counter()
                    run()
                    if turn:
                        seconds.setdefault((case.name, who), []).append(time.perf_counter() - began)
    middle = {key: median(values) for key, values in seconds.items()}
    rates = {c.name: c.nbytes / middle[c.name, "offload"] for c in chosen}
    rows = []
    for case in chosen:
        peer = middle.get((case.name, "torch"))
        rows.append(
            [
                case.name,
                f"`{case.file}`",
                number(rates[case.name], scale=1e9),
                number(case.nbytes / peer, scale=1e9) if peer else "",
                number(peer / middle[case.name, "offload"]) if peer else "",
                number(rates[case.name] / rates[case.bound], digits=2),
            ]
        )
    optimizers = [
        f"`{name}` {who} {case.parameters / middle[name, who] / 1e9:.2f}"
        for case in chosen
        for (name, who) in middle
        if name == case.name and case.parameters
    ]
    facts = hardware()
    body = (
        f"{machine_line(facts)}; {torch.get_num_threads()} threads; {date.today()}. Matrices of {SHAPE[0]} x "
        f"{SHAPE[1]}; medians of {a.rounds} rounds; compiling took {team.compiled_s:.1f} s.\n\n"
        + table(["op", "file", "GB/s", "torch, GB/s", "times torch", "of the bound"], rows)
        + "\nThe bound is the rate of pure reading; for AdamW that of copying, counted at 2 bytes a byte. "
        "A kernel that asks memory ahead can pass it.\n"
        + (f"\nParameters a second, in 10^9: {', '.join(optimizers)}.\n" if optimizers else "")
    )
    page = f"# CPU kernels, {date.today()}\n\n{body}"
    print(page)
    if a.docs:
        put_between(ROOT / "docs" / "kernels.md", "<!-- made by benchmarks/kernels.py --docs -->", "<!-- end -->", body)
    lines = [{"op": name, "who": who, "seconds": values} for (name, who), values in seconds.items()]
    write("kernels-cpu", {"hardware": facts, "versions": versions(), "rates": rates, "lines": lines}, page, a.out)


if __name__ == "__main__":
    main()
