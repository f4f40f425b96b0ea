"""Waiting for several transfers as for one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future


def join(parts: Sequence[Future[int]], finish: Callable[[], None] | None = None) -> Future[int]:
    """One future for several reads: their bytes in all once they have ended and `finish` has run, or the first error.

    It resolves only when no part is in flight any more, so that the memory may be reused even after an error.
    """
    whole: Future[int] = Future()
    whole.set_running_or_notify_cancel()
    left, lock = len(parts), threading.Lock()

    def end() -> None:
        try:
            total = sum(p.result() for p in parts)
            if finish is not None:
                finish()
        except BaseException as error:
            whole.set_exception(error)
        else:
            whole.set_result(total)

    def count(_: Future[int]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            end()

    if not parts:
        end()
    for part in parts:
        part.add_done_callback(count)
    return whole
