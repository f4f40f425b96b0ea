"""Steps without end from a position on, over the ends of epochs, and how many of them a run has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from offload.errors import UsageError
from offload.finetune.batches import Step, steps, steps_of
from offload.finetune.config import Train
from offload.finetune.rows import Position, Rows


@dataclass(frozen=True)
class Feed:
    """Where a run's steps come from.

    Attributes:
        rows: of all epochs.
        batch: rows of a micro-batch.
        accumulation: micro-batches of a step.
        pad: token id that fills rows up.
    """

    rows: Rows
    batch: int
    accumulation: int
    pad: int

    def after(self, position: Position) -> Iterator[Step]:
        """Step after step, epoch after epoch.

        Raises:
            UsageError: nothing of the data can be learnt.
        """
        while True:
            is_whole = position == Position(position.epoch)
            count = 0
            for step in self.epoch(position):
                yield step
                count += 1
            if is_whole and not count:
                raise UsageError("nothing of the training data can be learnt: every record is too long or empty")
            position = Position(position.epoch + 1)

    def epoch(self, position: Position) -> Iterator[Step]:
        """The rest of one epoch."""
        return steps(self.rows, position, batch=self.batch, accumulation=self.accumulation, pad=self.pad)

    def count(self, train: Train, progress: Callable[[str, int, int], None] | None = None) -> int:
        """Steps of the whole run: max_steps if it is given, else those of num_train_epochs, as transformers counts.

        Without max_steps every record is encoded once, to know how many rows an epoch has.
        """
        if train.max_steps > 0:
            return train.max_steps
        epochs = train.num_train_epochs
        found = [steps_of(rows, self.batch, self.accumulation) for rows in self.rows.count(math.ceil(epochs), progress)]
        if not all(found):
            raise UsageError("nothing of the training data can be learnt: every record is too long or empty")
        whole = int(epochs)
        return sum(found[:whole]) + (math.ceil((epochs - whole) * found[whole]) if epochs > whole else 0)
