"""Which implementation of an op runs, and why."""

import pytest

from offload import kernels
from offload.hardware import GpuInfo
from offload.kernels import OPS, available, choose

CARD = GpuInfo(index=0, name="Card", total=8 << 30, free=7 << 30, uuid="GPU-1", pcie_gen=4, pcie_width=16)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "probe_gpus", lambda: ([CARD], ""))
    monkeypatch.setattr(kernels, "_found", lambda package: True)


@pytest.mark.usefixtures("with_gpu")
@pytest.mark.parametrize("op", list(OPS))
def test_the_device_decides(op: str) -> None:
    for device, kind in (("cuda", "gpu"), ("cpu", "cpu")):
        choice = choose(op, device)
        assert choice.implementation == (kind if kind in OPS[op] else "torch")
        assert choice.why
        assert choose(op, device, exact=True).implementation == "torch"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "probe_gpus", lambda: ([], "no driver"))
    assert available()["gpu"] == "no: no driver"
    choice = choose("linear_int4", "cuda")
    assert (choice.implementation, choice.why) == ("torch", "no: no driver")
    with pytest.raises(kernels.UsageError, match="no driver"):
        choose("linear_int4", "cuda", forced="gpu")


def test_the_interpreter_counts_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_found", lambda package: True)
    assert available()["gpu"] == "yes"
