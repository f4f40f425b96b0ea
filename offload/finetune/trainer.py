"""Full-parameter fine-tuning: what a user's loop calls, step by step, with weights and state wherever they fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from offload.errors import ClosedError, ModelError, UsageError
from offload.finetune.activations import plan_swaps
from offload.finetune.aside import aside
from offload.finetune.encoding import IGNORED
from offload.finetune.memory import Spare, Wishes, fit_first, give_back, give_up, plan_memory
from offload.finetune.rehearsal import rehearse, working
from offload.finetune.sound import Sound
from offload.finetune.widest import GROWTH, Tokens, tokens_of
from offload.hardware import peak_rss_bytes, reset_peak_rss, rss_bytes
from offload.io.engine import Engine
from offload.optim.base import Numbers, Optimizer
from offload.runtime.adapted import Adapted
from offload.runtime.streams import Whereabouts
from offload.runtime.training import Training
from offload.runtime.zeroth import Zeroth

MicroBatch = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step was.

    Attributes:
        loss: mean over all label tokens of all micro-batches, in nats, before the update.
        grad_norm: global 2-norm of the gradient before clipping.
        step_s: wall time.
        read_bytes, write_bytes: moved from and to disk meanwhile.
        tokens: of all rows, padding included.
    """

    loss: float
    grad_norm: float
    step_s: float
    read_bytes: int
    write_bytes: int
    tokens: int


class Trainer:
    """A model in training. A context manager; use it in one thread at a time.

    Attributes:
        extra: stored with each commit and found again on resume: plain JSON values, small.
        learning_rate: of steps that are not told one.
        training: the engine below.
    """

    def __init__(
        self,
        root: nn.Module,
        training: Training | Zeroth,
        optimizer: Optimizer | None,
        engine: Engine,
        *,
        learning_rate: float,
        cpu_memory: int,
        wishes: Wishes | None,
        travels: bool = True,
        save: Callable[[Path], None],
        finish: Callable[[bool], None],
    ) -> None:
        """Args, of those that are not attributes:
        save: writes the model to a folder, which is empty.
        finish: gives memory and files back, told whether weights are those of the last step.
        """
        self.training, self.optimizer, self.learning_rate = training, optimizer, learning_rate
        self._root, self._engine, self._save, self._finish = root, engine, save, finish
        self._cpu_memory, self._wishes, self._travels = cpu_memory, wishes, travels
        self._sound = Sound(root)
        self._where = training.device.torch_device
        self.extra: dict[str, Any] = dict(training.state.extra)
        self._step = training.state.step
        self._broken: str | None = None
        self._is_closed = False
        self._spare: Spare | None = None
        self._notes: list[str] = []
        self._shapes: list[tuple[int, ...]] = []  # of the last step's rows
        self._room = Tokens()  # that memory was divided for
        self._peak = 0  # before it was last measured anew

    @property
    def step_number(self) -> int:
        """Steps done since the model was fresh; after a resume, that of the commit which was found."""
        return self._step

    @property
    def spare(self) -> Spare | None:
        """What became of the memory that the first step left, or the last one that had more tokens than any before;
        None before it."""
        return self._spare

    @property
    def peak_nbytes(self) -> int:
        """The process's largest resident set so far."""
        return max(self._peak, peak_rss_bytes())

    @property
    def model(self) -> nn.Module:
        """What is trained. After `flush` its parameters are the present weights, where those are in memory."""
        return self._root

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The present weights by name, wherever they are; each is good until the next one is asked for."""
        self.flush()
        return self.training.weights

    def flush(self) -> None:
        """Applies the updates that are due, so that the model's parameters are the present weights."""
        self._check()
        with self._whole("applying updates"):
            self.training.flush()

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What did not go the fast way, a sentence each."""
        return (*self._engine.fallbacks, *self.training.fallbacks, *self._notes)

    def note(self, fallback: str) -> None:
        """Adds to what did not go the fast way."""
        self._notes.append(fallback)

    def whereabouts(self) -> Whereabouts | None:
        """Where weights that are not trained by gradients are; None where all are."""
        return self.training.whereabouts() if isinstance(self.training, Adapted | Zeroth) else None

    def step(self, batch: MicroBatch | Sequence[MicroBatch], learning_rate: float | None = None) -> StepResult:
        """One update from all micro-batches: every label token weighs the same, whichever micro-batch it is in.

        Args:
            batch: what the model is called with, or several of them.
            learning_rate: of this step.

        Raises:
            UsageError: there is no label in any of them, or a batch is not what the model is called with.
            ModelError: the gradient is not finite. The state on disk is the last commit's.
        """
        self._check()
        began, before = time.perf_counter(), self._engine.statistics()
        batches = [batch] if isinstance(batch, Mapping | torch.Tensor) else list(batch)
        self._sound.check(batches)
        counts = [_labels_of(b) for b in batches]
        learnt = [(b, n) for b, n in zip(batches, counts, strict=True) if n]
        total = sum(counts)
        if not total:
            raise UsageError("no micro-batch of this step has a label to learn; check labels and what is masked")
        rate = self.learning_rate if learning_rate is None else learning_rate
        if not 0 <= rate < math.inf:
            raise UsageError(f"learning_rate={rate}: a step's is a number from 0 on")
        step = self._step + 1
        tokens = tokens_of(batches)
        is_first = self._spare is None and self._wishes is not None
        is_wider = self._outgrows(tokens)
        if is_wider and isinstance(self.training, Training) and self._wishes is not None:
            self.flush()
            give_up(self.training, self._wishes)
        predicted: int | None = None
        if is_first or is_wider:
            predicted = self._prepare([b for b, _ in learnt])
            self._peak = self.peak_nbytes
            reset_peak_rss()  # where that cannot be done, the peak is that of the process, and less is kept
        held = rss_bytes()
        self.training.backprop.measures = is_first or is_wider
        self._root.train()
        with self._whole(f"step {step}"):
            found = self.training.run(
                [self._loss(b) for b, _ in learnt],
                [n / total for _, n in learnt],
                lambda clip: Numbers(step=step, learning_rate=rate, grad_scale=clip),
                step,
            )
        self._step = step
        if (is_first or is_wider) and isinstance(self.training, Training) and self._wishes is not None:
            self.training.backprop.measures = False
            self._room, peak = tokens, peak_rss_bytes()
            if is_wider:
                self._room, peak = tokens.grown(), peak + int((GROWTH - 1) * max(0, peak - held))
                for part in self.training.backprop.parts.values():
                    part.graph_nbytes = int(GROWTH * part.graph_nbytes)
            peak = plan_swaps(
                self.training.backprop, self._wishes.activations, self._cpu_memory, peak,
                self.training.state_nbytes, len(learnt), time.perf_counter() - began, self._engine.statistics(),
            )  # fmt: skip
            spare = plan_memory(self.training, self._cpu_memory, peak, self._wishes, travels=self._travels)
            self._spare = replace(spare, predicted_nbytes=predicted)
        shapes = [tuple(b["input_ids"].shape) for b in batches if "input_ids" in b]
        if is_first or is_wider or shapes != self._shapes:  # the same step fits into the memory that it has left
            give_back(self._cpu_memory)
        self._shapes = shapes
        after = self._engine.statistics()
        return StepResult(
            loss=sum(loss * n for loss, (_, n) in zip(found.losses, learnt, strict=True)) / total,
            grad_norm=found.grad_norm,
            step_s=time.perf_counter() - began,
            read_bytes=after.read_bytes - before.read_bytes,
            write_bytes=after.write_bytes - before.write_bytes,
            tokens=tokens.total,
        )

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Sum of the label tokens' losses in nats and their number, with the present weights. Nothing changes.

        Raises:
            UsageError: a batch is not what the model is called with.
        """
        self._check()
        self._sound.check(batches)
        self._root.eval()
        pairs = [(b, n) for b in batches if (n := _labels_of(b))]
        with self._whole(f"an evaluation after step {self._step}"):  # it applies what is due, unit by unit
            losses = self.training.evaluate([self._loss(b) for b, _ in pairs], self._step)
        return sum(loss * n for loss, (_, n) in zip(losses, pairs, strict=True)), sum(n for _, n in pairs)

    def commit(self) -> None:
        """Makes this step, with `extra`, the one that a resume finds, whatever happens later.

        Raises:
            StorageError: it could not be written; the last commit holds.
        """
        self.flush()
        self.training.commit(self.extra)

    def save(self, folder: str | Path) -> None:
        """Writes the model as it is now: config and weights in the layout of the checkpoint that it came from.

        An older model in the folder stays until all of the new one is written.

        Raises:
            StorageError: something cannot be written.
        """
        self.flush()
        with aside(Path(folder)) as part:
            self._save(part)

    def close(self) -> None:
        """Gives memory and files back. What was not committed is lost. A module that was given has the last weights, or
        those that it came with, where a step failed."""
        if self._is_closed:
            return
        try:
            if self._broken is None:
                self.flush()
        finally:
            self._is_closed = True
            self._finish(self._broken is None)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """What fails in the middle leaves some units a step ahead of others: nothing more may come of them."""
        try:
            yield
        except BaseException as error:
            self._broken = f"{what} failed: {error}"
            raise

    def _outgrows(self, tokens: Tokens) -> bool:
        """Whether a step has more tokens than memory was divided for. On an accelerator, memory was divided before."""
        return self._spare is not None and not self.training.device.has_memory and not self._room.hold(tokens)

    def _prepare(self, batches: Sequence[MicroBatch]) -> int | None:
        """Makes room for a step whose micro-batches show what it will take; returns its peak in bytes."""
        training, wishes = self.training, self._wishes
        if type(training) is not Training or wishes is None or self._where.type != "cpu":
            return None
        self._root.train()
        widest = max(batches, key=lambda b: b["input_ids"].numel() if "input_ids" in b else 0)
        parts = training.backprop.parts
        needs = rehearse(parts, training.parameters.values(), lambda b: self._loss(b)(), widest)
        if needs is None:
            self._notes.append("nobody could foretell what activations take: the first step's room for them is a guess")
            return None
        parts[[*needs][-1]].keeps = True  # its backward follows its forward at once
        loose = sum(4 * training.parameters[n].numel() for n in training.loose)
        found = working(list(needs.values()), len(batches), loose)
        return fit_first(training, self._cpu_memory, found, wishes, travels=self._travels)

    def _loss(self, batch: MicroBatch) -> Callable[[], torch.Tensor]:
        def loss() -> torch.Tensor:
            given = {name: value.to(self._where) for name, value in batch.items()}
            if hasattr(self._root, "config"):
                given.setdefault("use_cache", False)  # type: ignore[arg-type]
            found = self._root(**given)
            loss = found[0] if isinstance(found, tuple) else found.loss if hasattr(found, "loss") else found
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise ModelError("the model gave no loss; it must return one when it is called with the batch")
            return loss

        return loss

    def _check(self) -> None:
        if self._is_closed:
            raise ClosedError("the trainer was closed; use it inside its `with` block")
        if self._broken is not None:
            raise ModelError(
                f"{self._broken}. Go on from the last commit, step {self.training.state.step}, with resume"
            )


def _labels_of(batch: MicroBatch) -> int:
    """Label tokens of a micro-batch, as a causal model shifts them; rows, for a model that takes no labels."""
    labels = batch.get("labels")
    if labels is None:
        return 1
    return int((labels[..., 1:] != IGNORED).sum()) if labels.dim() > 1 else int((labels != IGNORED).sum())
