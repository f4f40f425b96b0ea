"""Facts about machines: this one's are plausible, and those of machines made of text files are exact."""

import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload import hardware
from offload.hardware import HostMemory, auto_cpu_budget, host_memory

GIB, MIB = 1 << 30, 1 << 20
UNLIMITED_V1 = 9223372036854771712


class Machine:
    """A /proc and a control group tree, written below one folder."""

    def __init__(self, root: Path) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup fs"  # the space is escaped in mountinfo
        self.write(
            self.proc / "self/status", "Name:\tpython\nVmHWM:\t  3072 kB\nVmRSS:\t  2048 kB\nRssFile:\t   512 kB\n"
        )
        self._mounts: list[str] = []
        self._own: list[str] = []

    @staticmethod
    def write(path: Path, text: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def hierarchy(self, own: str, *, version: int, controllers: str = "", root: str = "/") -> Path:
        """Mounts a hierarchy whose folder `root` is visible, with this process in `own`; returns the mount point."""
        point = self.groups / (controllers or "unified")
        kind = "cgroup" if version == 1 else "cgroup2"
        escaped = str(point).replace(" ", r"\040")
        self._mounts.append(
            f"{30 + len(self._mounts)} 23 0:28 {root} {escaped} rw,nosuid shared:9 - {kind} {kind} rw,{controllers}"
        )
        self._own.append(f"{len(self._mounts) if version == 1 else 0}:{controllers if version == 1 else ''}:{own}")
        self.write(self.proc / "self/mountinfo", "\n".join(self._mounts))
        self.write(self.proc / "self/cgroup", "\n".join(self._own))
        point.mkdir(parents=True, exist_ok=True)
        return point

    def v2(self, folder: Path, *, max: object, usage: int = 0, cache: int = 0, high: object = "max") -> None:
        self.write(folder / "memory.max", max)
        self.write(folder / "memory.high", high)
        self.write(folder / "memory.current", usage)
        self.write(
            folder / "memory.stat", f"anon 1\nfile 99\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}"
        )

    def v1(self, folder: Path, *, limit: int, usage: int = 0, cache: int = 0) -> None:
        self.write(folder / "memory.limit_in_bytes", limit)
        self.write(folder / "memory.usage_in_bytes", usage)
        self.write(
            folder / "memory.stat", f"inactive_file 5\nactive_file 5\ntotal_inactive_file {cache}\ntotal_active_file 0"
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def limit_of(machine: Machine) -> tuple[int | None, int | None, str]:
    memory = host_memory(machine.proc)
    return memory.limit, memory.limit_free, memory.limit_source


def test_v2_limit_with_cache_that_can_be_dropped(machine: Machine) -> None:
    point = machine.hierarchy("/user/job", version=2)
    machine.v2(point / "user/job", max=4 * GIB, usage=3 * GIB, cache=2 * GIB)
    assert limit_of(machine) == (4 * GIB, 3 * GIB, "cgroup v2 /user/job")


def test_v2_the_limit_may_be_further_up(machine: Machine) -> None:
    point = machine.hierarchy("/user/job/step", version=2)
    machine.v2(point / "user/job/step", max="max")
    machine.v2(point / "user/job", max=6 * GIB, usage=GIB)
    machine.v2(point / "user", max=5 * GIB, usage=GIB)
    assert limit_of(machine) == (5 * GIB, 4 * GIB, "cgroup v2 /user")


def test_v2_a_neighbour_may_have_eaten_the_larger_limit(machine: Machine) -> None:
    point = machine.hierarchy("/user/job", version=2)
    machine.v2(point / "user/job", max=4 * GIB, usage=GIB)
    machine.v2(point / "user", max=8 * GIB, usage=7 * GIB)
    assert limit_of(machine) == (8 * GIB, GIB, "cgroup v2 /user")


def test_v2_high_throttles_before_max(machine: Machine) -> None:
    point = machine.hierarchy("/job", version=2)
    machine.v2(point / "job", max=8 * GIB, high=2 * GIB, usage=3 * GIB)
    assert limit_of(machine) == (2 * GIB, 0, "cgroup v2 /job")


def test_v1_limit(machine: Machine) -> None:
    machine.hierarchy("/", version=1, controllers="cpu,cpuacct")
    point = machine.hierarchy("/box/inner", version=1, controllers="memory")
    machine.v1(point / "box/inner", limit=UNLIMITED_V1)
    machine.v1(point / "box", limit=4 * GIB, usage=2 * GIB, cache=GIB)
    machine.v1(point, limit=UNLIMITED_V1)
    assert limit_of(machine) == (4 * GIB, 3 * GIB, "cgroup v1 /box")


def test_v1_in_a_container_that_sees_only_its_own_group(machine: Machine) -> None:
    point = machine.hierarchy("/docker/abc", version=1, controllers="memory", root="/docker/abc")
    machine.v1(point, limit=2 * GIB)
    assert limit_of(machine) == (2 * GIB, 2 * GIB, "cgroup v1 /docker/abc")


@pytest.mark.parametrize("own", ["/../sibling", "/elsewhere"])
def test_a_path_outside_what_is_mounted_starts_at_the_mount(machine: Machine, own: str) -> None:
    root = "/" if own.startswith("/..") else "/docker/abc"
    point = machine.hierarchy(own, version=2, root=root)
    machine.v2(point, max=2 * GIB)
    assert limit_of(machine) == (2 * GIB, 2 * GIB, f"cgroup v2 {root}")


def test_both_versions_at_once(machine: Machine) -> None:
    first = machine.hierarchy("/a", version=1, controllers="memory")
    machine.v1(first / "a", limit=3 * GIB)
    second = machine.hierarchy("/b", version=2)
    machine.v2(second / "b", max=2 * GIB)
    assert limit_of(machine)[2] == "cgroup v2 /b"
    machine.v2(second / "b", max=4 * GIB)
    assert limit_of(machine)[2] == "cgroup v1 /a"


@pytest.mark.parametrize("text", ["", "garbage", "0::/x"])
def test_no_limit_is_the_machine(machine: Machine, text: str) -> None:
    Machine.write(machine.proc / "self/cgroup", text)
    Machine.write(machine.proc / "self/mountinfo", text)
    memory = host_memory(machine.proc)
    assert (memory.limit, memory.limit_free, memory.limit_source) == (None, None, "machine")
    assert (memory.rss, memory.rss_file) == (2 * MIB, MIB // 2)
    assert memory.total >= memory.available > 0


def memory(
    available: int, limit: int | None = None, free: int | None = None, rss: int = 0, rss_file: int = 0
) -> HostMemory:
    source = "machine" if limit is None else "cgroup v2 /box"
    return HostMemory(
        total=64 * GIB,
        available=available,
        limit=limit,
        limit_source=source,
        limit_free=free,
        rss=rss,
        rss_file=rss_file,
    )


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (memory(40 * GIB), 38 * GIB),  # 5 %
        (memory(4 * GIB), 4 * GIB - 512 * MIB),  # at least 512 MiB
        (memory(4 * GIB, rss=GIB), 5 * GIB - 512 * MIB),  # what we hold is ours
        (memory(4 * GIB, rss=GIB, rss_file=GIB), 4 * GIB - 512 * MIB),  # mapped files are in "available" already
        (memory(40 * GIB, 4 * GIB, 3 * GIB, rss=GIB), 4 * GIB - 512 * MIB),
        (memory(40 * GIB, 4 * GIB, rss=GIB), 4 * GIB - 512 * MIB),  # usage unknown: at least ours
        (memory(GIB, 4 * GIB, 3 * GIB), 512 * MIB),  # the machine has less than the limit allows
        (memory(GIB, 100 * GIB, 90 * GIB), 512 * MIB),
        (memory(100 * MIB), 0),
    ],
)
def test_automatic_budget(given: HostMemory, budget: int) -> None:
    nbytes, why = auto_cpu_budget(given)
    assert nbytes == budget
    assert ("cgroup v2 /box: limit" in why) == (given.limit is not None and given.available > given.limit)
    assert "margin" in why


def test_own_memory() -> None:
    before = hardware.rss_bytes()
    block = mmap.mmap(-1, 64 * MIB)  # new pages, whatever the heap holds
    block.write(bytes([1]) * (64 * MIB))
    assert hardware.rss_bytes() - before > 60 * MIB
    peak = hardware.peak_rss_bytes()
    assert peak >= before + 60 * MIB
    block.close()
    if hardware.reset_peak_rss():
        assert hardware.peak_rss_bytes() < peak - 32 * MIB


def test_a_peak_that_cannot_be_reset(tmp_path: Path) -> None:
    assert not hardware.reset_peak_rss(tmp_path / "no such folder")
    assert hardware.rss_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("version", "files", "quota"),
    [
        (2, {"cpu.max": "150000 100000"}, 1.5),
        (2, {"cpu.max": "max 100000"}, None),
        (1, {"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000}, 0.5),
        (1, {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}, None),
    ],
)
def test_cpu_quota(machine: Machine, version: int, files: dict[str, object], quota: float | None) -> None:
    point = machine.hierarchy("/box", version=version, controllers="cpu,cpuacct" if version == 1 else "")
    for name, text in files.items():
        Machine.write(point / "box" / name, text)
    Machine.write(machine.proc / "cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    cpu = hardware.cpu_info(machine.proc)
    assert (cpu.model, cpu.quota) == ("Some CPU @ 3 GHz", quota)
    assert cpu.cores == (1 if quota else len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("text", ["always [madvise] never", "always madvise [never]", ""])
def test_huge_pages(tmp_path: Path, text: str) -> None:
    Machine.write(tmp_path / "kernel/mm/transparent_hugepage/enabled", text)
    assert hardware.huge_pages(tmp_path) == (text.partition("[")[2].partition("]")[0] or "unknown")


class FakeNvml:
    """Two cards and a slice of a card, as nvidia-ml-py shows them."""

    class NVMLError(Exception):
        pass

    cards = ("GPU-aaa", "GPU-bbb")

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in (*self.cards, "MIG-ccc"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=8 * GIB, free=7 * GIB)

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"card {handle[-3:]}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: str) -> int:
        if handle.startswith("MIG"):
            raise self.NVMLError("Not Supported")
        return 5

    nvmlDeviceGetCurrPcieLinkWidth = nvmlDeviceGetMaxPcieLinkGeneration


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["card aaa", "card bbb"]),
        ("1", ["card bbb"]),
        ("1, 0", ["card bbb", "card aaa"]),
        ("GPU-bbb", ["card bbb"]),
        ("MIG-ccc", ["card ccc"]),
        ("0,7,1", ["card aaa"]),
        ("GPU-zzz,0", []),
        ("-1", []),
        ("", []),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, why_none = hardware.probe_gpus()
    assert [gpu.name for gpu in found] == names
    assert [gpu.index for gpu in found] == list(range(len(names)))
    assert why_none == ("" if names else f"CUDA_VISIBLE_DEVICES={visible!r} leaves none")
    for gpu in found:
        assert (gpu.link_bytes_per_s is None) == gpu.uuid.startswith("MIG")
        assert (gpu.total, gpu.free) == (8 * GIB, 7 * GIB)


@pytest.mark.parametrize(("gen", "width", "rate"), [(3, 16, 15.76e9), (4, 8, 15.76e9), (5, 16, 63.04e9), (2, 4, 2e9)])
def test_link_rate(gen: int, width: int, rate: float) -> None:
    gpu = hardware.GpuInfo(index=0, name="", total=0, free=0, uuid="", pcie_gen=gen, pcie_width=width)
    assert gpu.link_bytes_per_s == pytest.approx(rate)


def test_no_gpu_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert hardware.probe_gpus() == ([], "nvidia-ml-py is not installed, so GPUs cannot be asked for")
    assert hardware.gpus() == []


def test_disk(tmp_path: Path) -> None:
    disk = hardware.disk_of(tmp_path / "not" / "yet")
    assert disk.path == tmp_path
    assert 0 <= disk.free <= disk.total
    number = tmp_path.stat().st_dev
    assert disk.device == f"{os.major(number)}:{os.minor(number)}"


def test_disk_is_the_deepest_mount_with_that_device(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    home = tmp_path.resolve()
    Machine.write(
        tmp_path / "proc/self/mountinfo",
        f"1 1 {device} / / rw - ext4 /dev/root rw\n"
        f"2 1 {device} / {home} rw,x - xfs /dev/disk1 rw\n"
        f"3 1 0:99 / {home}/deep rw - tmpfs tmpfs rw\n",
    )
    (tmp_path / "deep").mkdir()
    Machine.write(tmp_path / "sys/dev/block" / device / "queue/rotational", "0")
    disk = hardware.disk_of(tmp_path / "deep", proc=tmp_path / "proc", sys=tmp_path / "sys")
    assert (disk.filesystem, disk.source, disk.mount) == ("xfs", "/dev/disk1", str(home))
    assert disk.rotational is False


def test_nothing_is_known_of_a_disk_without_proc(tmp_path: Path) -> None:
    disk = hardware.disk_of(tmp_path, proc=tmp_path, sys=tmp_path)
    assert (disk.filesystem, disk.mount, disk.rotational) == ("unknown", "unknown", None)


def test_names_for_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hardware.fingerprint() == hardware.fingerprint()
    assert len(hardware.fingerprint()) == 12
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    assert hardware.cache_dir() == tmp_path
    monkeypatch.delenv("OFFLOAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert hardware.cache_dir() == Path("/xdg/offload")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hardware.cache_dir() == Path.home() / ".cache" / "offload"


def test_versions_import_nothing() -> None:
    versions = hardware.versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"]
