"""The heap's reserve: resident from the start, used first, given back; in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from offload.hardware import huge_pages
from offload.io.heap import Reserve

ROOT = Path(__file__).parents[2]
BEGIN = """
import ctypes, resource
from offload.hardware import rss_bytes
from offload.io.heap import Reserve
from offload.units import MIB
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_void_p
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def used(mib):
    block = libc.malloc(mib * MIB)
    ctypes.memset(block, 1, mib * MIB)
    return block
rss_bytes(), faults()
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, cwd=ROOT)
    assert not done.returncode, done.stdout + done.stderr


def test_a_reserve_is_resident_and_what_is_allocated_lies_in_it() -> None:
    """Sixteen blocks of 3 MiB would be 12,288 page faults."""
    run("""
before = rss_bytes()
with Reserve(64 * MIB) as reserve:
    assert reserve.nbytes == 64 * MIB and reserve.reason is None
    assert 64 * MIB <= rss_bytes() - before < 72 * MIB
    met, there = faults(), rss_bytes()
    for _ in range(3):
        blocks = [used(3) for _ in range(16)]
        for block in blocks:
            libc.free(block)
    assert faults() - met < 600, faults() - met
    assert rss_bytes() - there < 2 * MIB
assert rss_bytes() - before < 8 * MIB, "it is given back"
assert reserve.nbytes == 0
reserve.close()
""")


def test_what_does_not_fit_is_mapped_and_goes_back() -> None:
    run("""
with Reserve(16 * MIB):
    there = rss_bytes()
    block = used(40)
    assert block > libc.sbrk(0) and rss_bytes() - there > 36 * MIB
    libc.free(block)
    assert rss_bytes() - there < 4 * MIB
""")


def test_holes_are_not_used_first() -> None:
    """A hole in the heap that nobody has touched: a page fault for every 4 KiB of it."""
    run("""
libc.mallopt(-4, 0)
hole, behind = libc.malloc(24 * MIB), libc.malloc(4096)
libc.mallopt(-4, 65536)
libc.free(hole)
with Reserve(32 * MIB):
    met = faults()
    libc.free(used(20))
    assert faults() - met < 600, faults() - met
""")


def test_holes_behind_it_are_not_used_first_either() -> None:
    """What is smaller than the reserve fits better, wherever it is."""
    run("""
libc.mallopt(-4, 0)
blocks = [libc.malloc(size * MIB) for size in (40, 1, 21, 1, 24, 1, 12, 1)]
libc.mallopt(-4, 65536)
for hole in blocks[::2]:
    libc.free(hole)
with Reserve(32 * MIB) as reserve:
    assert reserve._begin < blocks[2]
    met = faults()
    libc.free(used(20))
    libc.free(used(10))
    assert faults() - met < 600, faults() - met
""")


def test_while_it_is_lent_the_system_has_it() -> None:
    run("""
with Reserve(64 * MIB) as reserve:
    there = rss_bytes()
    with reserve.lent(32 * MIB):
        assert 24 * MIB < there - rss_bytes() < 40 * MIB, there - rss_bytes()
    assert abs(rss_bytes() - there) < 2 * MIB
    met = faults()
    libc.free(used(48))
    assert faults() - met < 600, faults() - met
""")


def test_two_reserves_keep_the_settings_until_both_are_closed() -> None:
    run("""
first, second = Reserve(16 * MIB), Reserve(16 * MIB)
assert first.nbytes == second.nbytes == 16 * MIB
first.close()
block = used(8)
assert block < libc.sbrk(0), "in the heap"
libc.free(block)
second.close()
""")


def test_nothing_is_reserved_where_nothing_is_asked_for() -> None:
    reserve = Reserve(0)
    assert (reserve.nbytes, reserve.reason) == (0, None)
    with reserve.lent(1 << 20):
        pass
    reserve.close()


def test_a_thread_with_a_heap_of_its_own_is_told() -> None:
    run("""
import threading
found = []
def reserve():
    with Reserve(8 * MIB) as mine:
        found.append((mine.nbytes, mine.reason))
    libc.free(used(8))
thread = threading.Thread(target=reserve)
thread.start()
thread.join()
nbytes, reason = found[0]
assert (nbytes == 8 * MIB) == (reason is None), found
""")


@pytest.mark.skipif(huge_pages() not in ("always", "madvise"), reason="the kernel gives no huge pages")
def test_a_reserve_lies_in_huge_pages() -> None:
    run("""
def huge():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHugePages"))
before = huge()
with Reserve(64 * MIB):
    assert huge() - before >= 32 * 1024, "where memory is not too fragmented for them"
""")
