"""What two activities lose while both run: the part of its own speed that each keeps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from offload.probes.sampling import LEAST_S, Now, Run

IsOver = Callable[[], bool]
Loop = Callable[[IsOver], float]
"""Works until it is told that it is over; returns how much a second it did, in any unit."""
ROUNDS = 3
LEAST, MOST = 0.01, 1.0  # nothing is faster in company: what looks so is noise


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Something that keeps a lane or a processor busy.

    Attributes:
        name: of the lane or processor, with a word behind a dot where it is one of several kinds of work.
        loop: the work.
        is_lane: it may run in a thread of its own; a processor's work belongs to the main thread, whose team it uses.
        beside: names of what it ever runs beside; empty: everything.
    """

    name: str
    loop: Loop
    is_lane: bool = True
    beside: tuple[str, ...] = ()

    def meets(self, other: Activity) -> bool:
        """Both may run at once, in two threads."""
        return (self.is_lane or other.is_lane) and (not self.beside or other.name in self.beside)


def repeat(runs: Sequence[Run], now: Now = time.perf_counter, finish: Run = lambda: None) -> Loop:
    """Calls, one after the other, for ever; `finish` waits for what they queued."""

    def loop(is_over: IsOver) -> float:
        for run in runs[:2]:
            run()
        finish()
        began, count = now(), 0
        while not count or not is_over():
            runs[count % len(runs)]()
            count += 1
            if count % 16 == 0:
                finish()
        finish()
        return count / max(LEAST_S, now() - began)

    return loop


def matrix(
    activities: Sequence[Activity], seconds: float, on_pair: Callable[[str], None] = lambda _: None
) -> Mapping[str, Mapping[str, float]]:
    """Every pair that may meet: name -> the other's name -> the part of its speed that it keeps.

    Each pair is measured alone, together and alone again, `ROUNDS` times, because a disk's mood changes within seconds:
    a part is of what both were alone just before and after.
    """
    kept: dict[str, dict[str, float]] = {}
    for k, one in enumerate(activities):
        for other in activities[k + 1 :]:
            if not (one.meets(other) and other.meets(one)):
                continue
            on_pair(f"{one.name} beside {other.name}")
            parts: dict[str, list[float]] = {one.name: [], other.name: []}
            alone = [_alone(one, other, seconds / ROUNDS)]
            for _ in range(ROUNDS):
                both = _together([one, other], seconds / ROUNDS)
                alone.append(_alone(one, other, seconds / ROUNDS))
                for name, rate in both.items():
                    parts[name].append(rate / ((alone[-2][name] + alone[-1][name]) / 2))
            for a, b in ((one, other), (other, one)):
                kept.setdefault(a.name, {})[b.name] = min(MOST, max(LEAST, median(parts[a.name])))
    return kept


def _alone(one: Activity, other: Activity, seconds: float) -> dict[str, float]:
    return _together([one], seconds) | _together([other], seconds)


def _together(activities: Sequence[Activity], seconds: float) -> dict[str, float]:
    """What each of them does a second while all run. One that is no lane runs in the calling thread."""
    over = threading.Event()
    rates: dict[str, float] = {}
    failures: list[BaseException] = []

    def run(one: Activity) -> None:
        try:
            rates[one.name] = one.loop(over.is_set)
        except BaseException as error:
            failures.append(error)
            over.set()

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in activities if one.is_lane]
    timer = threading.Timer(seconds, over.set)
    try:
        for thread in (timer, *threads):
            thread.start()
        for one in activities:
            if not one.is_lane:
                run(one)
    finally:
        if any(not one.is_lane for one in activities):
            over.set()
        for thread in threads:
            thread.join()
        timer.cancel()
        timer.join()
    if failures:
        raise failures[0]
    return rates
