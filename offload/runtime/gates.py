"""Gated feed-forward layers by a kernel: silu(gate) * up in one pass, found by what a module computes.

A module of three linears and one thing without parameters is run once with linears that answer made-up numbers. If the
third is then asked for silu of one answer times the other, bit by bit, and its own answer is what comes out, the kernel
takes over between the products; the linears themselves are called as before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from offload.kernels.chosen import Kernels
from offload.runtime.linears import MANY, needs_gradient

Roles = tuple[str, str, str]
"""Names of the children that are gate, up and down."""


def install(root: nn.Module, kernels: Kernels) -> Callable[[], None]:
    """Gives every such module below `root` the kernel; returns what takes it away again."""
    known: dict[tuple[object, ...], Roles | None] = {}
    changed = []
    for module in root.modules() if kernels.choice("silu_mul").implementation == "cpu" else ():
        children = dict(module.named_children())
        linears = [child for child in children.values() if isinstance(child, nn.Linear)]
        others = [child for child in children.values() if not isinstance(child, nn.Linear)]
        if len(linears) != 3 or len(others) != 1 or any(True for _ in others[0].parameters()):
            continue
        if "forward" in module.__dict__ or any(c._forward_hooks or c._forward_pre_hooks for c in children.values()):
            continue
        like = type(module), type(others[0]), tuple(children)
        if like not in known:
            known[like] = _roles(module, {n: c for n, c in children.items() if c in linears})
        if (roles := known[like]) is not None:
            module.forward = _forward(module, roles, kernels)
            changed.append(module)

    def remove() -> None:
        for module in changed:
            module.__dict__.pop("forward", None)

    return remove


def _roles(module: nn.Module, linears: dict[str, nn.Linear]) -> Roles | None:
    """Which linear is which, if the module is such a layer."""
    numbers = torch.Generator().manual_seed(0)
    x, *made = (torch.randn(3, 16, generator=numbers) for _ in range(4))
    answers = dict(zip(linears, made, strict=True))
    asked: dict[str, torch.Tensor] = {}
    before = {name: linear.__dict__.get("forward") for name, linear in linears.items()}

    def answering(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(given: torch.Tensor) -> torch.Tensor:
            asked[name] = given
            return answers[name]

        return forward

    for name, linear in linears.items():
        linear.forward = answering(name)  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            result = module.forward(x)
    except Exception:  # it takes something else than a matrix, and may say so in any way: it keeps its own forward
        return None
    finally:
        for name, linear in linears.items():
            linear.__dict__.pop("forward")
            if (own := before[name]) is not None:
                linear.forward = own  # type: ignore[method-assign]
    first = [name for name, given in asked.items() if given is x]
    last = [name for name, given in asked.items() if given is not x]
    if len(first) != 2 or len(last) != 1 or result is not answers[last[0]]:
        return None
    for gate, up in (first, first[::-1]):
        if torch.equal(asked[last[0]], functional.silu(answers[gate]) * answers[up]):
            return gate, up, last[0]
    return None


def _forward(module: nn.Module, roles: Roles, kernels: Kernels) -> Callable[..., torch.Tensor]:
    own = type(module).forward
    gate, up, down = (module._modules[name] for name in roles)
    assert gate is not None
    assert up is not None
    assert down is not None

    def forward(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args or kwargs or x.numel() < MANY * x.shape[-1]:
            return own(module, x, *args, **kwargs)  # type: ignore[no-any-return]
        left, right = gate(x), up(x)
        both = None if needs_gradient(left, right) else kernels.attempt("silu_mul", left, right)
        return down(functional.silu(left) * right if both is None else both)  # type: ignore[no-any-return]

    return forward
