"""The Triton kernels compile for GPUs that are not here; in a process of its own, since here they are interpreted."""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from patience import HANGS_S

HERE = Path(__file__).parent
SHARED_NBYTES = 99 << 10  # what a program may have on consumer GPUs of compute capability 8.6 and 8.9

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="triton is not installed")


def compiled(tmp_path: Path, *words: str) -> list[str]:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, (str(HERE), clean.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), *words],
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def check(lines: list[str]) -> None:
    assert len(lines) > 8
    for line in lines:
        found = re.fullmatch(r"(\S+) for (\d+): (\d+) bytes, (\d+) of shared memory", line)
        assert found, line
        assert int(found[4]) <= SHARED_NBYTES, line


def test_every_kernel_compiles(tmp_path: Path) -> None:
    check(compiled(tmp_path, "90"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_every_variant_compiles(capability: str, tmp_path: Path) -> None:
    check(compiled(tmp_path, "--all", capability))
