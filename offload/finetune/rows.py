"""Rows of token ids in an order that follows from a seed, from any position on, packed or one sequence each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offload.errors import DataError
from offload.finetune.encoding import Encoder, Pair
from offload.finetune.files import Records
from offload.finetune.packing import pack
from offload.messages import Unusable

WINDOW = 256  # records that are encoded at once, whose sequences may share rows
Row = list[Pair]  # sequences that lie behind one another


@dataclass(frozen=True)
class Position:
    """Where the next row is: exact, and small enough to be stored with every commit.

    Attributes:
        epoch: passes over the data that are complete.
        record: where its window begins in the epoch's order.
        row: rows of that window that are used up.
    """

    epoch: int = 0
    record: int = 0
    row: int = 0


@dataclass
class Counts:
    """What happened to records so far.

    Attributes:
        cut_tokens: left out because sequences were too long.
        empty: records of which nothing is left to learn.
        bad: records that could not be encoded.
    """

    cut_tokens: int = 0
    empty: int = 0
    bad: int = 0


class Rows:
    """All rows of all epochs.

    Attributes:
        counts: what happened to records: to all of them once `count` was called, else to those seen so far.
        tokens: of all sequences of an epoch; 0 until `count` was called.

    Args:
        records: what there is.
        encoder: makes sequences of them.
        max_length: tokens of a packed row.
        packing: let short sequences share a row.
        shuffle: a new order in each epoch.
        seed: of the orders.
        skip_bad: leave out records that cannot be encoded instead of raising.
    """

    def __init__(
        self,
        records: Records,
        encoder: Encoder,
        *,
        max_length: int,
        packing: bool = False,
        shuffle: bool = True,
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.records, self._encoder, self.packing = records, encoder, packing
        self._max_length, self._shuffle, self._seed, self._skip_bad = max_length, shuffle, seed, skip_bad
        self.counts, self.tokens, self._is_counted = Counts(), 0, False

    def after(self, position: Position) -> Iterator[tuple[Row, Position]]:
        """Rows of the rest of the position's epoch, each with the position behind it."""
        order = self.order(position.epoch)
        done = position.row
        for start in range(position.record, len(order), WINDOW):
            sequences = [pair for k in order[start : start + WINDOW] for pair in self._sequences(int(k))]
            arranged = self.arrange([len(ids) for ids, _ in sequences], position.epoch, start)
            following = Position(position.epoch, start + WINDOW)
            if start + WINDOW >= len(order):
                following = Position(position.epoch + 1)
            for k, members in enumerate(arranged):
                if k >= done:
                    behind = Position(position.epoch, start, k + 1) if k + 1 < len(arranged) else following
                    yield [sequences[m] for m in members], behind
            done = 0

    def order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Numbers of the records in the order of an epoch."""
        if not self._shuffle:
            return np.arange(len(self.records))
        return np.random.default_rng((self._seed, epoch)).permutation(len(self.records))

    def arrange(self, lengths: Sequence[int], epoch: int, start: int) -> list[list[int]]:
        """Which sequences of a window share which row, in the rows' order. It needs their lengths alone."""
        rows = pack(lengths, self._max_length) if self.packing else [[k] for k in range(len(lengths))]
        if self._shuffle:  # of a window, the pieces of one text and rows of one filling would else be neighbours
            generator = np.random.default_rng((self._seed, epoch, start))
            rows = [rows[k] for k in generator.permutation(len(rows))]
        return rows

    def count(self, epochs: int, progress: Callable[[str, int, int], None] | None = None) -> list[int]:
        """Rows of each of the first epochs. Encodes every record once and keeps nothing but lengths."""
        lengths: list[tuple[int, ...]] = []
        self.counts, self._is_counted = Counts(), False
        for k in range(len(self.records)):
            lengths.append(tuple(len(ids) for ids, _ in self._sequences(k)))
            if progress is not None and (k + 1) % 64 == 0:
                progress("counting tokens", k + 1, len(self.records))
        self.tokens, self._is_counted = sum(map(sum, lengths)), True
        if not self.packing:  # one row for each sequence, whatever the order
            return [sum(map(len, lengths))] * epochs
        found = []
        for epoch in range(epochs):
            order = self.order(epoch)
            found.append(
                sum(
                    len(pack([n for k in order[start : start + WINDOW] for n in lengths[k]], self._max_length))
                    for start in range(0, len(order), WINDOW)
                )
            )
        return found

    def _sequences(self, index: int) -> list[Pair]:
        try:
            encoded = self._encoder.encode(self.records[index])
        except Unusable as error:
            if not self._skip_bad:
                raise DataError(str(error), *self.records.place(index)) from None
            self._tally(bad=1)
            return []
        self._tally(cut=encoded.cut, empty=not encoded.sequences)
        return encoded.sequences

    def _tally(self, *, cut: int = 0, empty: int = 0, bad: int = 0) -> None:
        if not self._is_counted:
            self.counts.cut_tokens += cut
            self.counts.empty += empty
            self.counts.bad += bad
