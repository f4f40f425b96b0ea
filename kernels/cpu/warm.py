"""Compiles all kernels that are not in the cache yet, on every core."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from offload.kernels.cpu.team import TeamFunction, all_functions

_FEW = 4  # kernels that are not worth another process, which starts in the time of two


def compile_all(progress: Callable[[str, int, int], None] | None = None) -> float:
    """Compiles what is missing, in as many processes as there are cores; returns the seconds it took.

    numba compiles on one thread only. What a process cannot do, for whatever reason, this one does.

    Args:
        progress: called with a kernel's name, how many are done and how many there are to compile.
    """
    began = time.perf_counter()
    missing = [function for function in all_functions() if not function.is_compiled()]
    left, done, lock = list(missing), 0, threading.Lock()

    def take() -> TeamFunction | None:
        nonlocal done
        with lock:
            if not left:
                return None
            function = left.pop(0)
            if progress is not None:
                progress(function.name, done, len(missing))
            done += 1
            return function

    def serve_one() -> None:
        with subprocess.Popen(
            [sys.executable, "-c", "from offload.kernels.cpu.warm import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            if not process.stdout.readline():  # it did not start
                return
            while (function := take()) is not None:
                process.stdin.write(f"{function.name}\n")
                process.stdin.flush()
                if not process.stdout.readline():
                    return

    others = [
        threading.Thread(target=serve_one) for _ in range(min(len(os.sched_getaffinity(0)) - 1, len(left) // _FEW))
    ]
    for other in others:
        other.start()
    while (function := take()) is not None:
        function.compile()
    for other in others:
        other.join()
    for function in missing:
        function.compile()
    return time.perf_counter() - began


def serve() -> None:
    """Compiles the kernels whose names come in, a line each, and answers with a line each."""
    functions = {function.name: function for function in all_functions()}
    print(flush=True)
    for line in sys.stdin:
        functions[line.strip()].compile()
        print(flush=True)
