import io
from pathlib import Path

import pytest
from rich.console import Console

from offload import doctor, hardware
from offload.doctor import Finding, examine, render

AREAS = {
    "software",
    "memory",
    "huge pages",
    "locked memory",
    "processor",
    "kernels",
    "disk",
    "I/O backends",
    "GPU",
    "hub",
}


def test_every_area_is_examined_and_nothing_is_left_behind(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert {finding.area for finding in findings} == AREAS
    assert {finding.status for finding in findings} <= {"ok", "warn", "missing"}
    assert not [finding for finding in findings if "could not be examined" in finding.what]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there() -> None:
    said = [finding.what for finding in examine("/no/such/folder") if finding.area == "disk"]
    assert said[0] == "there is no folder /no/such/folder; this is of /, where it would be made"


def test_a_failing_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the driver is upset")

    for name in ("host_memory", "probe_gpus", "disk_of", "versions", "cpu_info", "huge_pages"):
        monkeypatch.setattr(hardware, name, broken)
    whats = [finding.what for finding in examine()]
    assert sum("could not be examined: RuntimeError: the driver is upset" in what for what in whats) >= 5


def test_software_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "versions", lambda: {"python": "3.12.1", "torch": "2.10.1+cu128", "transformers": None}
    )
    python, torch, transformers = doctor._check_software("")
    assert python[0] == "ok"
    assert torch == ("warn", "torch 2.10.1+cu128", "tested with 2.11 and later, below 2.14")
    assert transformers[0] == "missing"
    assert "pip install 'transformers>=5.17,<5.24'" in transformers[2]


def test_little_memory_and_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    memory = hardware.HostMemory(
        total=24 * gib, available=20 * gib, limit=2 * gib, limit_source="cgroup v2 /box", limit_free=gib, rss=gib // 4
    )
    monkeypatch.setattr(hardware, "host_memory", lambda: memory)
    monkeypatch.setattr(hardware, "huge_pages", lambda: "never")
    findings = {(finding.area, finding.status): finding for finding in examine()}
    assert "cgroup v2 /box" in findings["memory", "warn"].what
    assert "echo madvise" in findings["huge pages", "warn"].advice


def test_a_gpu_in_a_narrow_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    card = hardware.GpuInfo(index=0, name="Card", total=8 << 30, free=7 << 30, uuid="GPU-1", pcie_gen=4, pcie_width=8)
    monkeypatch.setattr(hardware, "probe_gpus", lambda: ([card], ""))
    found = list(doctor._check_gpu(""))
    assert found[0] == ("ok", "0: Card, 7.00 GiB of 8.00 GiB free")
    assert found[1][:2] == ("warn", "0: PCIe 4 x8, at most 15.76 GB/s a direction")


@pytest.mark.parametrize(("value", "says"), [("1", "offline"), ("0", "may be downloaded")])
def test_hub(monkeypatch: pytest.MonkeyPatch, value: str, says: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert [says in found[1] for found in doctor._check_hub("")] == [True]


def test_render_prints_facts_and_advice() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    render([Finding("disk", "warn", "full [really]", "buy one"), Finding("disk", "ok", "ext4")], console)
    text = console.export_text()
    assert "full [really]" in text
    assert "→ buy one" in text
    assert text.count("disk") == 1
