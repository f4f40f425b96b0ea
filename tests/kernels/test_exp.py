"""Powers of two against float64, over the whole range."""

import torch

from offload.kernels.cpu.exp import exp2
from offload.kernels.cpu.memory import get_i64, load_f32, store_f32
from offload.kernels.cpu.team import team_function


@team_function("test_exp2")
def _powers(block: int) -> None:
    count, source, target = get_i64(block, 2), get_i64(block, 3), get_i64(block, 4)
    for k in range(0, count, 16):
        store_f32(target, k, exp2(load_f32(source, k)))


def powers(y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(y)
    _powers(1, len(y), y.data_ptr(), out.data_ptr())
    return out


def test_error_in_units_in_the_last_place() -> None:
    y = torch.cat([torch.linspace(-126, 127, 160_000), torch.linspace(-1, 1, 160_000)])
    exact = torch.exp2(y.double())
    unit = torch.exp2(torch.floor(torch.log2(exact)) - 23)
    assert float(((powers(y) - exact).abs() / unit).max()) <= 1.5


def test_ends_of_the_range() -> None:
    y = torch.tensor([0.0, -0.0, 1.0, -1.0, 127.0, -126.0, -126.5, -1000.0, -1e30, -torch.inf, torch.nan, *[-3.0] * 5])
    got = powers(y)
    assert got[:6].tolist() == [1, 1, 2, 0.5, 2.0**127, 2.0**-126]
    assert not got[6:10].any()
    assert got[10].isnan()
