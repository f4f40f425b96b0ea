"""Compiles the Triton kernels to machine code for GPUs that need not be here, as the cases in gpu_cases.py call them.

    python tests/kernels/compile_kernels.py [--all] CAPABILITY...     # 80 or 90, say

Every kernel once, or with --all every variant of it that the cases need; one line for each. The interpreter takes much
that the compiler does not: this is what a machine without a GPU can know of it.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import triton
from gpu_cases import cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
WARP = 32
Launch = tuple[JITFunction, ASTSource, dict[str, int]]


def launch(kernel: JITFunction, args: tuple[Any, ...], given: dict[str, Any]) -> Launch:
    """What Triton would compile for a call: types, constants, and which numbers are multiples of 16."""
    options = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
    values = dict(zip(kernel.arg_names, args, strict=False)) | given
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        is_number = isinstance(value, int) and not parameter.is_constexpr
        if parameter.is_constexpr or value is None or (is_number and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if is_number else f"*{TYPES[value.dtype]}"
            if not parameter.do_not_specialize and (not is_number or value % 16 == 0):
                attributes[(at,)] = [["tt.divisibility", 16]]
    return kernel, ASTSource(kernel, signature, constants, attributes), options


def launches() -> Iterator[Launch]:
    """Of all cases. The kernels themselves do not run, so what the ops return is not looked at."""
    seen: list[Launch] = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **given: seen.append(launch(kernel, args, given))
    for case in cases():
        op = getattr(import_module(f"offload.kernels.gpu.{case.op}"), case.op)
        case.results(op, *case.arguments(), **case.options)
        yield from seen
        seen.clear()


def main(words: list[str]) -> None:
    wants_all = "--all" in words
    done = set()
    for kernel, source, options in launches():
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        key = (name, str(source.signature), str(source.constants), str(source.attrs), str(options))
        if (key if wants_all else name) in done:
            continue
        done.add(key if wants_all else name)
        for capability in (word for word in words if word.isdecimal()):
            made = triton.compile(source, target=GPUTarget("cuda", int(capability), WARP), options=options)
            print(f"{name} for {capability}: {len(made.asm['cubin'])} bytes, {made.metadata.shared} of shared memory")


if __name__ == "__main__":
    main(sys.argv[1:])
