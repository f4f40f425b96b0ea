"""What a terminal shows while a model generates: a spinner until the first word, then the words, or a count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.status import Status


class Words(transformers.TextStreamer):
    """Prints words as they come; the first one ends the spinner."""

    def __init__(self, tokenizer: Any, status: Status) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._status = status

    def put(self, value: torch.Tensor) -> None:
        """See transformers.TextStreamer; the first call brings the prompt."""
        if not self.next_tokens_are_prompt:
            self._status.stop()
        super().put(value)


class Live:
    """The spinner of one generation, and what moves it.

    Attributes:
        streamer: for generate, or None when text is printed at the end.
    """

    def __init__(self, status: Status, tokenizer: Any | None, batch: int) -> None:
        self._status, self._batch, self._began = status, batch, 0.0
        self.streamer = Words(tokenizer, status) if tokenizer is not None else None

    def on_token(self, count: int) -> None:
        """A step is done."""
        if self.streamer is not None:
            return
        if count == 1:
            self._began = time.monotonic()
            self._status.update("1 token")
        else:
            rate = (count - 1) * self._batch / (time.monotonic() - self._began)
            self._status.update(f"{count} tokens, {rate:.2f} tokens/s")


@contextmanager
def live(console: Console, tokenizer: Any | None, batch: int) -> Iterator[Live]:
    """Shows that something happens until the block ends.

    Args:
        tokenizer: prints words as they come; None shows a count instead.
        batch: sequences of one step.
    """
    with console.status("prefill") as status:
        yield Live(status, tokenizer, batch)
