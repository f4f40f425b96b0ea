"""Where there is no GPU, Triton's kernels are interpreted in the tests' own process, and nowhere else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, util

from offload.hardware import probe_gpus

SWITCH = "TRITON_INTERPRET"
WANTED = util.find_spec("triton") is not None and not probe_gpus()[0]


@contextmanager
def switched() -> Iterator[None]:
    """Triton looks at its switch when a kernel is defined. Afterwards the environment is as it was."""
    before = os.environ.get(SWITCH)
    if WANTED:
        os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(SWITCH, None)
        if before is not None:
            os.environ[SWITCH] = before


def import_triton() -> None:
    """Comes before all else that may import it, as transformers does: Triton's own functions are kernels too."""
    if WANTED:
        with switched():
            import_module("triton")
