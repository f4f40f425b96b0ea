"""What every test runs under: no network, no tokenizer warnings, no measured profile, interpreted Triton kernels.

One thread computes, unless a module asks for `two_threads`: on tiny models a second one costs more than it does, and
where tests run in several workers they share its core.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from forks import Forks
from triton_switch import import_triton

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OFFLOAD_CACHE"] = os.path.join(tempfile.gettempdir(), f"offload-tests-{os.getpid()}")  # nothing is in it
os.environ.setdefault("OMP_NUM_THREADS", "1")
atexit.register(shutil.rmtree, os.environ["OFFLOAD_CACHE"], ignore_errors=True)
import_triton()


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs code in processes of their own that have imported the libraries already."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """torch's ops and our kernels share their work among two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
