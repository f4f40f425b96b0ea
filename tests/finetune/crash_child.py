"""Trains a tiny model to its end, and again in forks that kill themselves at a chosen system call, over and over.

What a folder's name ends with says how it is trained: clip, noclip, travel-clip, travel-noclip, zo or lora; if the name
has device, it is an emulated one; if it has share, that makes half of the updates, and inputs of units wait on disk.
Every fork goes on from the last commit. Each is killed (SIGKILL) at its k-th call of those that touch files, k drawn
at random, until enough of them have been; the last runs to its end. The run that nobody kills comes first, in the
process that is forked then: what libraries set up at first use is there for all.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from patience import HANGS_S

import offload
from offload.runtime import zeroth
from offload.tiers.commit import MANIFEST

STEPS = 6
CALLS = ("open", "write", "fsync", "rename", "pwritev", "preadv", "close", "unlink", "posix_fallocate")


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def arm(k: int) -> None:
    """Makes this process kill itself at its k-th call from now."""
    left = k
    for name in CALLS:
        true = getattr(os, name)

        def call(*args: Any, true: Any = true, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return true(*args, **kwargs)

        setattr(os, name, call)


def options(name: str) -> dict[str, Any]:
    """What the folder's name asks for."""
    if name.endswith("zo"):
        zeroth.REPLAYED = 2  # so that weights that stay are written too
        return {"method": "zo", "zo_eps": 1e-2, "zo_write_every": 2, "resident_weights": 0.4}
    there: dict[str, Any] = {}
    if "device" in name:
        there = {"device": "emulated", "gpu_memory": "1400KiB", "tokens": 64}
    if "share" in name:
        there |= {"gpu_memory": "8MiB", "update_share": 0.5, "activations": "disk"}
    if name.endswith("lora"):
        there = {"method": "lora", "lora": {"r": 2}, "resident_weights": 0.4}
    return {
        "max_grad_norm": None if name.endswith("noclip") else 0.5,
        "resident": 0.3,
        "resident_weights": 0.4 if "travel" in name else None,
    } | there


def train(model: Path, folder: Path) -> None:
    """Trains to the end, with a commit after each step, and writes what it saw."""
    with offload.finetuning(
        model, offload_dir=folder / "state", learning_rate=1e-2, resume=True, **options(folder.name)
    ) as trainer:
        while trainer.step_number < STEPS:
            step = trainer.step_number
            if trainer.extra.get("position", 0) != step:
                raise AssertionError(f"step {step} was resumed with {trainer.extra}")
            result = trainer.step([batch(2 * step), batch(2 * step + 1)])
            with open(folder / "losses.jsonl", "a") as file:
                file.write(json.dumps([step, result.loss, result.grad_norm]) + "\n")
            trainer.extra = {"position": trainer.step_number}
            trainer.commit()
        digest = hashlib.sha256()
        for name, weights in sorted(trainer.weights().items()):
            digest.update(name.encode() + weights.detach().view(torch.int16).numpy().tobytes())
    state = json.loads((folder / "state" / MANIFEST).read_bytes().partition(b"\n")[2])
    for name, (_, checksum) in sorted(state["shards"].items()):
        digest.update(f"{name} {checksum}".encode())
    (folder / "digest").write_text(digest.hexdigest())


def train_and_kill(model: Path, folder: Path, seed: int, kills: int) -> None:
    """Trains in forks, see above."""
    rng = random.Random(seed)
    killed = 0
    while True:
        k = rng.randrange(1, 300) if killed < kills else None
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # makes torch's pool anew here: two threads at once would fail
                if k is not None:
                    arm(k)
                train(model, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed += 1
        elif status:
            raise SystemExit("a fork failed")
        elif k is None:
            return
        else:
            for path in (folder / "state").iterdir():  # it came to its end: start again
                path.unlink()


def outcome(folder: Path) -> dict[str, Any]:
    """A digest of all weights and state, and the losses and norms that were seen of each step."""
    seen: dict[int, list[Any]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        step, *numbers = json.loads(line)
        if numbers not in seen.setdefault(step, []):
            seen[step].append(numbers)
    return {"digest": (folder / "digest").read_text(), "seen": seen}


def settle() -> None:
    """Returns when this is the only thread: a fork would miss the others. One that was joined takes a while to go."""
    until = time.monotonic() + HANGS_S
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < until, "a thread goes on after its trainer was closed"
        os.sched_yield()


def main(model: str, name: str, seed: str, kills: str) -> None:
    """Prints the outcome of the run that nobody kills, and of the other one: a JSON line."""
    folders = [Path(model).with_name(f"{how}-{name}") for how in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    train(Path(model), folders[0])
    settle()
    train_and_kill(Path(model), folders[1], int(seed), int(kills))
    print(json.dumps([outcome(folder) for folder in folders]))
