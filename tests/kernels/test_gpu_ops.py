"""Every Triton kernel against exact results: interpreted on this machine, compiled with -m gpu on one with a GPU."""

import pytest
import torch
from gpu_cases import Case, cases, moved
from kernel_errors import assert_near
from triton_kernels import GPU_OPS, place

from offload.kernels import choose

__all__ = ["place"]
CASES = list(cases())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_it_is_near_the_exact_result(case: Case, place: str) -> None:
    given = case.arguments()
    exact = case.exact(*given, **case.options)
    there, options = [moved(value, place) for value in given], moved(case.options, place)
    choice = choose(case.op, "cuda", forced="gpu")
    assert choice.refuses()(*there, **options) is None
    for got, want in zip(case.results(choice.function(), *there, **options), exact, strict=True):
        assert got.shape == want.shape
        if want.dtype == torch.float64:
            what = f"{case.op}, {case.label}"
            assert_near(got.cpu(), want, roundings=case.roundings, what=what, sums=case.sums)
        else:
            assert torch.equal(got.cpu(), want)


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(GPU_OPS)
