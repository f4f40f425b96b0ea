"""Imports the Triton kernels for this machine: compiled where torch sees a CUDA device, interpreted elsewhere.

Triton decides when a kernel is defined, so whoever tests kernels imports this first. The environment is put back, so
that nothing else in the process is interpreted.
"""

import os
import sys
from importlib import import_module, util

import pytest
import torch

from offload.kernels import OPS

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SWITCH = "TRITON_INTERPRET"
GPU_OPS = [op for op, kinds in OPS.items() if "gpu" in kinds]


def _import_all() -> bool:
    """Whether kernels are interpreted."""
    assert "triton" not in sys.modules, "triton was imported before it was known how kernels are to run"
    before = os.environ.get(SWITCH)
    if not torch.cuda.is_available():
        os.environ[SWITCH] = "1"
    try:
        for op in GPU_OPS:
            import_module(f"offload.kernels.gpu.{op}")
        return import_module("offload.kernels.gpu.launch").INTERPRETED
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


INTERPRETED = _import_all()
PLACES = [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that a test's tensors lie on."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process: there is a CUDA device")
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("there is no CUDA device, or TRITON_INTERPRET is set")
    if INTERPRETED:
        monkeypatch.setenv(SWITCH, "1")  # some of Triton's helpers ask again when they run
    return str(request.param)
