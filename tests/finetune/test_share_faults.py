"""An accelerator that fails in its updates: the step ends and says what failed, and the last commit holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from reference_loop import ReferenceLoop
from test_device import accelerated, check_all_back
from test_full import NUMBERS, B, batches, check, plain
from test_travel import held_out
from test_update_share import TIERS, small_shards

import offload
from offload.finetune.trainer import Trainer
from offload.planner.training_steps import DownloadShard, UpdateThere, UploadShard
from offload.runtime.progress import Progress
from offload.runtime.updates_there import UpdatesThere
from offload.tiers.emulated import EmulatedDevice

__all__ = ["small_shards"]  # the tiny models' units have several shards
BOUND_S = 120  # until a step counts as hanging
METHODS = {
    UploadShard: ("upload", "upload", "uploading the state of"),
    UpdateThere: ("update", "compute_aside", "updating on the accelerator the state of"),
    DownloadShard: ("download", "download_into", "downloading the state of"),
}


class Fault:
    """Lets one step of a kind fail on the device, in front of its work or behind it.

    Args:
        kind: UploadShard, UpdateThere or DownloadShard.
        count: how many of them go well before.
        stays: the device does nothing any more, as a GPU whose context is gone.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: Any, *, count: int, is_late: bool, stays: bool) -> None:
        self._step, self._method, _ = METHODS[kind]
        self._left, self._is_late, self._stays = count, is_late, stays
        self.shard: str | None = None
        self.is_known = threading.Event()  # the failure has been recorded
        self.is_armed = False
        self.is_behind: threading.Event | None = None  # it fails when this has happened
        self._here = threading.local()  # the shard whose state a lane is at work on
        for name, _, _ in METHODS.values():
            patch.setattr(UpdatesThere, name, self._at_work(name, getattr(UpdatesThere, name)))
        patch.setattr(Progress, "fail", self._recording(Progress.fail))
        for name in ("upload", "download_into", "compute_aside", "mark_compute", "synchronize", "close"):
            patch.setattr(EmulatedDevice, name, self._failing(name, getattr(EmulatedDevice, name)))

    def _at_work(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(updates: Any, step: Any, *rest: Any) -> Any:
            self._here.shard = step.shard if name == self._step else None
            try:
                return work(updates, step, *rest)
            finally:
                self._here.shard = None

        return run

    def _recording(self, fail: Callable[..., None]) -> Callable[..., None]:
        def run(progress: Any, error: BaseException) -> None:
            fail(progress, error)
            self.is_known.set()

        return run

    def _failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(device: Any, *arguments: Any) -> Any:
            if self.is_known.is_set() and self._stays:
                raise RuntimeError("the device is lost")
            shard = getattr(self._here, "shard", None)
            if not self.is_armed or name != self._method or shard is None:
                return call(device, *arguments)
            self._left -= 1
            if self._left >= 0:
                return call(device, *arguments)
            if self.is_behind is not None:
                assert self.is_behind.wait(BOUND_S)
            if self._is_late:
                call(device, *arguments)
            self.shard, self.is_armed = shard, False
            raise RuntimeError("the device is lost")

        return run


def ends(work: Callable[[], Any]) -> Any:
    """What work gives or raises; it may not hang."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(timeout=BOUND_S)


def rings(mine: Trainer) -> list[Any]:
    training = mine.training
    pools = [training._there.ring, training._updates.slots.ring, *training._lanes.rings.pools]
    return pools


def cases() -> Iterator[Any]:
    """Every kind of step with every place of state and with and without clipping; other values take turns."""
    for k, kind in enumerate(METHODS):
        for j, tier in enumerate(("a ring on the device", "half on the device, state on disk", "a ring in memory too")):
            for i, clip in enumerate((0.5, None)):
                marks = [pytest.mark.slow] * ((k + j + i) % 2)  # any two values still meet
                yield pytest.param(kind, tier, clip, (j + i) % 3, bool((k + i) % 2), bool((j + i) % 2), marks=marks)


@pytest.mark.parametrize(("kind", "tier", "clip", "count", "is_late", "stays"), list(cases()))
def test_a_device_that_fails(
    kind: Any,
    tier: str,
    clip: float | None,
    count: int,
    is_late: bool,
    stays: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = TIERS[tier] | {"max_grad_norm": clip, "update_share": 0.6}
    with monkeypatch.context() as patch:
        mine = accelerated(tmp_path, "llama-tied", B, **options)
        loop = ReferenceLoop(plain(tmp_path / "model", B), max_grad_norm=clip, **NUMBERS)
        fault = Fault(patch, kind, count=count, is_late=is_late, stays=stays)
        check(mine, loop, 1, steps=2)
        mine.commit()
        fault.is_armed = True

        def go_on() -> None:  # with clipping the updates of a step are made in the next one
            for k in range(3):
                mine.step(batches(7 + k, 1))

        with pytest.raises(offload.TrainingError) as error:
            ends(go_on)
        assert fault.shard is not None
        text = str(error.value)
        assert text.startswith(f"{METHODS[kind][2]} {fault.shard} failed"), text
        assert "RuntimeError: the device is lost" in text
        for work in (lambda: mine.step(batches(9, 1)), mine.commit, mine.flush):
            with pytest.raises(offload.ModelError, match="Go on from the last commit, step 2, with resume"):
                work()
        with pytest.raises((offload.TrainingError, RuntimeError), match="the device is lost"):
            ends(mine.training._lanes.rest)
        assert not mine.training._lanes.is_running
        check_all_back(rings(mine))
        ends(mine.close)
    with accelerated(tmp_path, "llama-tied", B, resume=True, **options) as mine:
        assert mine.step_number == 2
        assert mine.evaluate(batches(50, 2)) == held_out(loop)
        check(mine, loop, 2, steps=2)


@pytest.mark.parametrize(
    ("kind", "count", "other", "skipped"),
    [
        (UploadShard, 2, "download_into", 0),
        (UpdateThere, 1, "download_into", 0),
        (DownloadShard, 0, "compute_aside", 1),
    ],
)
def test_what_another_lane_is_in_the_middle_of_ends_behind_the_fault(
    kind: Any, count: int, other: str, skipped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault waits until the other lane is there, which needs nothing of what fails; its work ends behind it."""
    options: dict[str, Any] = TIERS["some of each"] | {"max_grad_norm": None, "update_share": 0.6}
    with monkeypatch.context() as patch:
        mine = accelerated(tmp_path, "llama-tied", B, **options)
        for k in range(2):
            mine.step(batches(k, 1))
        mine.commit()
        fault = Fault(patch, kind, count=count, is_late=False, stays=False)
        inside, calls, work = threading.Event(), [], getattr(EmulatedDevice, other)

        def held(device: Any, *arguments: Any) -> Any:
            calls.append(other)
            if len(calls) == skipped + 1:
                inside.set()
                assert fault.is_known.wait(BOUND_S)
            return work(device, *arguments)

        patch.setattr(EmulatedDevice, other, held)
        fault.is_behind = inside
        fault.is_armed = True
        with pytest.raises(offload.TrainingError, match=f"{METHODS[kind][2]} .* failed: RuntimeError"):
            ends(lambda: mine.step(batches(7, 1)))
        with pytest.raises(offload.TrainingError):
            ends(mine.training._lanes.rest)
        check_all_back(rings(mine))
        ends(mine.close)
    with accelerated(tmp_path, "llama-tied", B, resume=True, **options) as mine:
        assert mine.step_number == 2
        mine.step(batches(2, 1))
