"""Runs one command of a benchmark: its last JSON line, with wall time, everybody else's CPU time and bytes written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SECTOR = 512  # what ru_oublock counts, whatever the disk
MARK = '{"memory_limit"'  # how memlimit.sh's closing line on standard error begins


def busy_s() -> float:
    """CPU seconds that the whole machine used since it started, without idling and waiting for the disk."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def run(command: Sequence[str], *, timeout_s: float, wants_json: bool = True) -> dict[str, Any]:
    """Runs `command` to its end, or to the timeout, in a process group of its own.

    Returns:
        The last line of its output that is a JSON object, or {"error": ...} ({"output": ...} without wants_json); with
        exit (124: timed out), wall_s, cpu_s (its own), other_cpu_s (what everything else on the machine took
        meanwhile), written_bytes (what it made the disk write), cgroup (from memlimit.sh), and the command.
    """
    before, busy = resource.getrusage(resource.RUSAGE_CHILDREN), busy_s()
    began = time.perf_counter()
    status, out, err = _finish(command, timeout_s, environment())
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result, status = _outcome(status, out, err, wants_json)
    limits = [text for text in err.splitlines() if text.startswith(MARK)]
    if limits:
        result["cgroup"] = json.loads(limits[-1])
    return result | {
        "exit": status,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "other_cpu_s": round(max(0.0, busy_s() - busy - cpu_s), 2),
        "written_bytes": (after.ru_oublock - before.ru_oublock) * SECTOR,
        "command": " ".join(command),
    }


def _outcome(status: int, out: str, err: str, wants_json: bool) -> tuple[dict[str, Any], int]:
    """What a command had to say, and its exit status: 1 when it ended well without the line it owes."""
    if not wants_json:
        return {"output": (out or err)[-1500:]}, status
    line = last_json(out) if status == 0 else None
    return ({"error": (err or out)[-1500:]}, status or 1) if line is None else (line, status)


def environment() -> dict[str, str]:
    """For children: offload is found without being installed, nothing asks the network, no bytecode is written."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def last_json(text: str) -> dict[str, Any] | None:
    """The last line of `text` that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(found, dict):
                return found
    return None


def _finish(command: Sequence[str], timeout_s: float, env: Mapping[str, str]) -> tuple[int, str, str]:
    """(exit status, output, error output). At the timeout, or when this program is ended, the group ends with it."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        list(command), stdout=pipe, stderr=pipe, text=True, errors="replace", env=env, cwd=ROOT, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)  # memlimit.sh then still reports, and removes its cgroup
        try:
            out, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, out, err
    return process.returncode, out, err


def announce(line: Mapping[str, Any], what: str) -> None:
    """One line on the terminal about a run that ended."""
    step = line.get("decode_s_per_token")
    found = f"{step:.4f} s a step" if step else "" if line["exit"] == 0 else f"FAILED: {last_line(line)}"
    print(f"{what}: {found} ({line['wall_s']:.0f} s, others used {line['other_cpu_s']:.1f} s of CPU)", flush=True)


def last_line(line: Mapping[str, Any]) -> str:
    """What a failed command said last."""
    said = [text for text in str(line.get("error", "")).splitlines() if text.strip() and not text.startswith(MARK)]
    return said[-1] if said else f"exit status {line['exit']}"
