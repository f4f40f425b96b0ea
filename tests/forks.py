"""Runs code in forks of one process that has imported the libraries: to import them anew takes seconds every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

USUAL = ("transformers.models.llama.modeling_llama", "transformers.models.qwen3_moe.modeling_qwen3_moe", "offload.api")


@dataclass(frozen=True)
class Ended:
    """A process that has ended: minus the signal that killed it, or its status; and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """The process that is forked. Starts with the first run; it computes on one thread, as every fork does."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, code: str, *arguments: object) -> Ended:
        """Runs `code` as `python -c` would, with arguments in sys.argv."""
        if self._process is None:
            path = os.pathsep.join(filter(None, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            texts = [Path(folder, name) for name in ("stdout", "stderr")]
            request = [code, [str(a) for a in arguments], [str(t) for t in texts]]
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            return Ended(status, *(t.read_text() for t in texts))

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def serve() -> None:
    """Forks for each line that comes in, and answers with the status of the fork."""
    import torch

    torch.set_num_threads(1)  # no thread may have been started when a process forks
    for name in USUAL:
        import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(*request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(code: str, arguments: list[str], texts: list[str]) -> None:
    """Runs code in this process and ends it."""
    sys.argv = ["-c", *arguments]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(texts, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    status: Any = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
