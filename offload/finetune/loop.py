"""The loop: a learning rate and micro-batches go in, facts of the step come out, and now and then a commit."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from offload.errors import BudgetError, TrainingError, UsageError
from offload.finetune.ahead import ahead
from offload.finetune.config import Train
from offload.finetune.feed import Feed
from offload.finetune.protocol import Trainer
from offload.finetune.rows import Position
from offload.finetune.schedules import learning_rate, warmup_steps

Line = dict[str, Any]


@dataclass
class Stop:
    """Whether somebody asked the run to end after its step, and by which signal."""

    signal: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run is made of.

    Attributes:
        train: its section of the configuration.
        feed: training data.
        eval_feed: held-out data, or None.
        total_steps: at which it ends.
        identity: what must be the same for a resumed run to be the same run.
        on_line: called with every line of the journal.
        on_export: called with the number of steps when a copy of the model is due.
    """

    train: Train
    feed: Feed
    total_steps: int
    eval_feed: Feed | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    on_line: Callable[[Line], None] = lambda line: None
    on_export: Callable[[int], None] = lambda step: None


def run(trainer: Trainer, what: Run, stop: Stop) -> bool:
    """Trains until the last step, or until `stop`. The state is committed when it returns. True: it is complete.

    Raises:
        BudgetError: memory has no room for a step; what was done is committed.
        TrainingError: the loss is not finite; the last commit is from before.
        UsageError: the trainer comes from a commit of another run.
    """
    train, total = what.train, what.total_steps
    warmup = warmup_steps(train.warmup_steps, total)
    position = resumed_position(trainer, what.identity)
    if trainer.step_number == 0:
        evaluate(trainer, what)
    committed = trainer.step_number
    with closing(ahead(what.feed.after(position))) as feed:
        for step in feed:
            done = trainer.step_number
            if done >= total or stop.signal:
                break
            rate = learning_rate(train.lr_scheduler_type, train.learning_rate, done, warmup=warmup, total=total)
            try:
                result = trainer.step(step.micro_batches, learning_rate=rate)
            except BudgetError:  # before anything was changed: its rows are longer than any before
                if done != committed:
                    trainer.commit()
                raise
            if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
                raise TrainingError(
                    f"step {done + 1}: the loss is {result.loss} and the gradient's norm {result.grad_norm}; the last "
                    f"commit is of step {committed}. Lower train.learning_rate, clip with train.max_grad_norm, or look "
                    "at the data"
                )
            trainer.extra = {"position": asdict(step.behind), "identity": dict(what.identity), "total_steps": total}
            what.on_line(
                {
                    "step": done + 1,
                    "epoch": step.behind.epoch,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "learning_rate": rate,
                    "step_s": result.step_s,
                    "tokens": step.tokens,
                    "tokens_per_s": step.tokens / result.step_s if result.step_s else 0.0,
                    "peak_rss_bytes": trainer.peak_nbytes,
                    "read_bytes": result.read_bytes,
                    "write_bytes": result.write_bytes,
                }
            )
            done += 1
            if done % train.save_steps == 0 or done == total:
                trainer.commit()
                committed = done
            if done == total or (train.eval_steps and done % train.eval_steps == 0):
                evaluate(trainer, what)
            if train.export_steps and done % train.export_steps == 0 and done < total:
                what.on_export(done)
    if trainer.step_number != committed:  # somebody asked to stop between two commits
        trainer.commit()
    return trainer.step_number >= total


def resumed_position(trainer: Trainer, identity: Mapping[str, Any]) -> Position:
    """Where the data goes on.

    Raises:
        UsageError: something that decides the order of the data, or the data, is not what it was.
    """
    if "position" not in trainer.extra:
        return Position()
    before = trainer.extra["identity"]
    changed = [f"{k} was {before.get(k)} and is {v}" for k, v in identity.items() if before.get(k) != v]
    if changed:
        raise UsageError(
            f"--resume: the run was committed at step {trainer.step_number} with other data: {'; '.join(changed)}. Put "
            "it back as it was, or begin anew in another train.output_dir"
        )
    return Position(**trainer.extra["position"])


def evaluate(trainer: Trainer, what: Run) -> None:
    """Measures the loss on held-out data and writes a line of it."""
    if what.eval_feed is None:
        return
    began, loss, tokens = time.perf_counter(), 0.0, 0
    for step in what.eval_feed.epoch(Position()):
        part, count = trainer.evaluate(step.micro_batches)
        loss, tokens = loss + part, tokens + count
    if not tokens:
        raise UsageError("nothing of the held-out data (data.eval) can be predicted: every record is too long or empty")
    seconds = time.perf_counter() - began
    what.on_line({"step": trainer.step_number, "eval_loss": loss / tokens, "eval_tokens": tokens, "eval_s": seconds})


@contextmanager
def finishing_steps() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the run after its step; a second one ends it at once.

    Outside the main thread, where Python does not allow it, signals are left alone.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
