"""An iterator that is advanced in a thread of its own, a few items ahead: tokenising beside training.

Items come in the same order, each with the position behind it, so what is resumable stays so.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

Item = TypeVar("Item")
DEPTH = 2  # items that wait; one more is being made
_STEP_S = 0.1  # between two looks whether anybody still wants items


class _End:
    """What comes behind the last item: its error, if there was one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterator[Item], depth: int = DEPTH) -> Generator[Item, None, None]:
    """The same items, made ahead. An error of `items` is raised where its item would come.

    The thread begins with the first item that is asked for, and ends with the last one, or when this is closed.
    """
    waiting: queue.Queue[Item | _End] = queue.Queue(depth)
    is_closed = threading.Event()

    def offer(item: Item | _End) -> bool:
        while not is_closed.is_set():
            try:
                waiting.put(item, timeout=_STEP_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not offer(item):
                    return
        except BaseException as found:
            error = found
        offer(_End(error))

    thread = threading.Thread(target=make, name="offload-data", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        is_closed.set()
        thread.join()
