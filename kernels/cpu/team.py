"""Runs compiled functions on the threads that torch computes with.

torch's OpenMP library keeps a team of threads. `GOMP_parallel` asks that very team to run a function, as torch's own
ops do, so there is no second pool to compete for the cores, `torch.set_num_threads` holds for both, and a call costs
microseconds. Work is claimed piece by piece from a counter: a thread that lost its core to an I/O thread does less.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numba import types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from offload.kernels.cpu.helper import OPTIONS

compiled_s = 0.0  # seconds that compiling took in this process; what came from the cache does not count
_SIGNATURE = normalize_signature(types.void(types.int64))
_HEAD = 2  # the counter and the number of pieces
_compiling = threading.Lock()
_known: list[TeamFunction] = []


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache on disk, in files of a kernel's own, named after it and the code of all kernels.

    numba's own key sees changes in the function's file only, and never finds a function that was made by another one
    and calls a third. Its files serve all functions that one piece of code makes, and two processes that add to one at
    the same time can lose an entry, or put one's code in the other's place.
    """

    def __init__(self, python: Callable[[int], None], name: str) -> None:
        super().__init__(python)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = IndexDataCacheFile(self._cache_path, f"{name}-{_sources()[:16]}", stamp)

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), _sources()


@functools.cache
def _sources() -> str:
    """A digest of the code of all kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _own_symbols(name: str) -> Iterator[None]:
    """Numbers functions that are compiled meanwhile from a place that belongs to `name`.

    numba tells functions of one name apart by a number that counts from 1 in every process, and puts it into their
    symbols. Two kernels that were compiled by two processes may hold helpers of one symbol and of different code, and
    a third process that takes both from the cache would call one of them for both.
    """
    counted = FunctionIdentity._unique_ids
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") << 16
    FunctionIdentity._unique_ids = itertools.count(start)
    try:
        yield
    finally:
        FunctionIdentity._unique_ids = counted


class TeamFunction:
    """A function of one address, compiled at first use and kept in numba's cache on disk.

    It gets the address of a block of int64: a counter, the number of pieces, and the arguments of the call. It is to
    claim pieces until none is left, and is run by every thread of the team at once.
    """

    def __init__(self, python: Callable[[int], None], name: str) -> None:
        self.name, self._python = name, python
        _known.append(self)

    @functools.cached_property
    def _address(self) -> int:
        global compiled_s
        with _compiling:
            began = time.perf_counter()
            made = self._function()
            with _own_symbols(self.name):
                made.compile()
            if not made.cache_hits:
                compiled_s += time.perf_counter() - began
        self._made = made  # it owns the machine code
        return int(made.address)

    def _function(self) -> Any:
        made = CFunc(self._python, _SIGNATURE, locals={}, options=OPTIONS)
        made._cache = _Cache(self._python, self.name)
        return made

    def is_compiled(self) -> bool:
        """Whether its machine code is in the cache."""
        made = self._function()
        key = made._cache._index_key(made._sig, made._targetdescr.target_context.codegen())
        return key in made._cache._cache_file._load_index()

    def compile(self) -> None:
        """Now rather than at first use."""
        assert self._address

    @property
    def address(self) -> int:
        """Of the machine code."""
        return self._address

    def __call__(self, pieces: int, *arguments: int, threads: int | None = None) -> None:
        """Runs all pieces; returns when they are done.

        Args:
            pieces: how many there are to claim.
            arguments: what the function reads behind the counter.
            threads: how many work on it; default: torch's number.
        """
        block = (ctypes.c_int64 * (_HEAD + len(arguments)))(0, pieces, *arguments)
        threads = min(threads or torch.get_num_threads(), pieces)
        run = _runner()
        if threads <= 1 or run is None:
            ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._address)(ctypes.addressof(block))
        else:
            run(self._address, ctypes.addressof(block), threads, 0)


def team_function(name: str) -> Callable[[Callable[[int], None]], TeamFunction]:
    """Decorator: see TeamFunction. Of two functions made by one piece of code, each needs a name of its own."""
    return lambda python: TeamFunction(python, name)


def all_functions() -> list[TeamFunction]:
    """Those of every kernel."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        importlib.import_module(f"offload.kernels.cpu.{path.stem}")
    return list(_known)


@functools.cache
def _runner() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, its argument, threads, flags) of the OpenMP library in this process, if it has one."""
    try:
        run = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run  # type: ignore[no-any-return]
