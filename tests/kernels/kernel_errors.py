"""How far a kernel's results are from the same sum in float64; shown as a table when it is too far."""

from collections.abc import Mapping

import torch

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def assert_near(got: torch.Tensor, exact: torch.Tensor, *, roundings: float, what: str, sums: int = 1) -> None:
    """Holds `got` to `exact` (float64): the largest error, over the size of the results, in roundings of got's dtype.

    Args:
        roundings: how many are allowed.
        what: op and dtype, for the table.
        sums: terms of a result; each may round once in float32.
    """
    error = (got.double() - exact).abs()
    size = exact.square().mean().sqrt().clamp_min(1e-30)
    unit = ROUNDING[got.dtype]
    allowed = roundings * unit + sums**0.5 * ROUNDING[torch.float32]
    largest = float((error / exact.abs().clamp_min(size)).max())
    rows: Mapping[str, float] = {
        "max": float(error.max()),
        "mean": float(error.mean()),
        "relative": float(error.square().mean().sqrt() / size),
        "largest": largest,
        "allowed": allowed,
    }
    table = "\n".join(f"  {name:9} {value:.3e}" for name, value in rows.items())
    assert bool(torch.isfinite(got).all()), f"{what}: not finite"
    assert largest <= allowed, f"{what}: the error is too large\n{table}"
