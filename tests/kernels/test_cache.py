"""Kernels that different processes compiled work together when a third takes them from the cache."""

from __future__ import annotations

from pathlib import Path

from forks import Forks

PRODUCT = """
import sys
import numba
import torch
from offload.kernels.cpu import linear
numba.config.CACHE_DIR = sys.argv[1]
for name in sys.argv[2:]:
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(64, 64).to(dtype)
    torch.testing.assert_close(linear.linear(x, weight), torch.nn.functional.linear(x, weight))
"""


def test_kernels_of_two_processes_in_a_third(tmp_path: Path, forks: Forks) -> None:
    for dtypes in (["float32"], ["bfloat16"], ["bfloat16", "float32"]):
        before = set(tmp_path.rglob("*.nbc"))
        done = forks.run(PRODUCT, tmp_path, *dtypes)
        assert done.returncode == 0, done.stderr
        assert (set(tmp_path.rglob("*.nbc")) > before) is (len(dtypes) == 1), "the third compiles nothing"
