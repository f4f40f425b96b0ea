"""Imports the Triton kernels for this machine: compiled where there is a CUDA device, interpreted elsewhere."""

from importlib import import_module, util

import pytest
import torch
from triton_switch import SWITCH, switched

from offload.kernels import OPS

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

GPU_OPS = [op for op, kinds in OPS.items() if "gpu" in kinds]
with switched():
    for _op in GPU_OPS:
        import_module(f"offload.kernels.gpu.{_op}")
    INTERPRETED: bool = import_module("offload.kernels.gpu.launch").INTERPRETED


def _cannot_interpret() -> bool:
    """Whether Triton's interpreter stumbles over a loop: that of 3.6 does with NumPy 2.4 and later."""
    triton = import_module("triton")

    def loop(turns):  # type: ignore[no-untyped-def]
        for _ in range(turns):
            pass

    with switched():
        try:
            triton.jit(loop)[(1,)](2)
        except triton.runtime.errors.InterpreterError:
            return True
    return False


CANNOT_INTERPRET = INTERPRETED and _cannot_interpret()
PLACES = [pytest.param("cpu", id="interpreted"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that a test's tensors lie on."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process: there is a GPU")
    if request.param == "cpu" and CANNOT_INTERPRET:
        pytest.skip("this Triton's interpreter cannot run loops with this NumPy: numpy<2.4 or triton>=3.7 can")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("torch sees no CUDA device, or kernels are interpreted in this process")
    if INTERPRETED:
        monkeypatch.setenv(SWITCH, "1")  # some of Triton's helpers ask again when they run
    return str(request.param)
