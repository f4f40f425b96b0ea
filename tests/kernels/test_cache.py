"""Kernels that different processes compiled work together when a third takes them from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRODUCT = """
import sys
import torch
from offload.kernels.cpu import linear
for name in sys.argv[1:]:
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(64, 64).to(dtype)
    torch.testing.assert_close(linear.linear(x, weight), torch.nn.functional.linear(x, weight))
"""


def test_kernels_of_two_processes_in_a_third(tmp_path: Path) -> None:
    for dtypes in (["float32"], ["bfloat16"], ["bfloat16", "float32"]):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", PRODUCT, *dtypes], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
