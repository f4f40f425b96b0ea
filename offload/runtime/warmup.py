"""Work that every first pass would do once, done while the disk is busy filling memory anyway."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from offload.kernels.chosen import Kernels
from offload.runtime.linears import MANY
from offload.tiers.layout import Source
from offload.tiers.packing import pack

_WIDTH = 256


def compile_kernels(kernels: Kernels, sources: Iterable[Source], *, has_transposed: bool = False) -> None:
    """Imports the kernels that a model's weights need and compiles them, or fetches them from their cache. Do it before
    memory is divided: compilers are large, and stay in the process.

    Args:
        has_transposed: some matrices lie as [inputs, outputs].
    """
    found = list(sources)
    for dtype in {s.dtype for s in found if s.form is None and s.dtype.is_floating_point and len(s.shape) == 2}:
        for op, rows in (("linear", 1), ("linear_many", MANY), *([("linear_transposed", 1)] * has_transposed)):
            _try(kernels, op, torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=kernels.device), dtype, rows)
        if kernels.device == "cpu":
            _try_token(kernels, dtype)
            if kernels.choice("silu_mul").implementation == "cpu":
                kernels.attempt("silu_mul", *torch.zeros(2, MANY, _WIDTH, dtype=dtype))
    for dtype in {s.dtype for s in found if s.form is None and len(s.shape) == 3}:
        x, stack = (torch.zeros(*shape, _WIDTH, dtype=dtype) for shape in ((MANY + 1,), (2, _WIDTH)))
        if kernels.device == "cpu" and kernels.choice("linear_groups").implementation != "torch":
            kernels.run("linear_groups", x, stack, (1, MANY))
    for like in {(replace(s.form, outputs=_WIDTH, inputs=_WIDTH), s.dtype, s.is_made) for s in found if s.form}:
        form, dtype, is_made = like
        matrix = torch.zeros(_WIDTH, _WIDTH, dtype=dtype)
        if is_made:
            pack(matrix, form, kernels)
        run = torch.zeros(form.nbytes, dtype=torch.uint8, device=kernels.device)
        kernels.unpack(form.view(run), dtype)
        if not kernels.exact:
            _try(kernels, f"linear_{form.kind}", form.view(run), dtype)


def _try(kernels: Kernels, op: str, weight: Any, dtype: torch.dtype, rows: int = 1) -> None:
    """One product, if the chosen implementation is not torch's own and takes it."""
    x = torch.zeros(rows, _WIDTH, dtype=dtype, device=kernels.device)
    if kernels.choice(op).implementation != "torch" and kernels.refuses(op, x, weight) is None:
        kernels.run(op, x, weight)


def _try_token(kernels: Kernels, dtype: torch.dtype) -> None:
    """What only a token behind others needs: it would wait for it after the prompt."""
    cache = torch.zeros(1, 2, 16, 64, dtype=dtype)
    x, matrix = torch.zeros(1, _WIDTH, dtype=dtype), torch.zeros(_WIDTH, _WIDTH, dtype=dtype)
    for op, arguments, options in (
        ("decode_attention", (torch.zeros(1, 4, 1, 64, dtype=dtype), cache, cache), {"scale": 1.0}),
        ("linears", (x, [(matrix, None), (matrix, None)]), {}),
    ):
        if kernels.choice(op).implementation != "torch" and kernels.refuses(op, *arguments, **options) is None:
            kernels.attempt(op, *arguments, **options)


def warm_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Runs a small matrix product, a matrix-vector product and an attention, so that libraries start their threads and
    compile their first kernels now. Call it in the thread that will run the model: thread pools belong to their caller.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return
    weight = torch.zeros(_WIDTH, _WIDTH, dtype=dtype, device=device)
    with torch.no_grad():
        for rows in (32, 1):
            x = torch.zeros(rows, _WIDTH, dtype=dtype, device=device)
            functional.linear(x, weight)
            heads = torch.zeros(1, 4, rows, 64, dtype=dtype, device=device)
            functional.scaled_dot_product_attention(heads, heads, heads)
