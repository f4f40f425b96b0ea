"""The trainer that defines correct: all in memory, torch's autograd, AdamW on float32 masters, nothing clever."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from offload.finetune.protocol import MicroBatch


@dataclass(frozen=True)
class PlainResult:
    """See offload.finetune.protocol.StepResult."""

    loss: float
    grad_norm: float
    step_s: float
    read_bytes: int
    write_bytes: int
    tokens: int


class PlainTrainer:
    """See offload.finetune.protocol.Trainer."""

    def __init__(self, model: str | Path, folder: Path, *, resume: bool, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").train()
        self._parameters = list(self.model.parameters())
        self._masters = [p.detach().float().clone().requires_grad_() for p in self._parameters]
        self._max_norm = options["max_grad_norm"]
        self._optimizer = torch.optim.AdamW(
            self._masters,
            lr=options["learning_rate"],
            betas=options["betas"],
            eps=options["eps"],
            weight_decay=options["weight_decay"],
        )
        self._file = folder / "plain.pt"
        self.step_number, self.extra = 0, {}
        if resume and self._file.exists():
            found = torch.load(self._file)
            self.step_number, self.extra = found["step"], found["extra"]
            self._optimizer.load_state_dict(found["optimizer"])
            with torch.no_grad():
                for parameter, master, saved in zip(self._parameters, self._masters, found["masters"], strict=True):
                    master.copy_(saved)
                    parameter.copy_(master)

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float | None = None) -> PlainResult:
        began = time.perf_counter()
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)
        total = 0.0
        for batch in micro_batches:
            loss = self._sum(batch) / tokens
            loss.backward()
            total += loss.item()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_norm or float("inf"))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate if learning_rate is not None else group["lr"]
        self._optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)
        self.step_number += 1
        size = sum(b["input_ids"].numel() for b in micro_batches)
        return PlainResult(total, float(norm), time.perf_counter() - began, 0, 0, size)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> tuple[float, int]:
        with torch.no_grad():
            loss = sum(self._sum(b).item() for b in micro_batches)
        return loss, sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return ()

    def whereabouts(self) -> None:
        return None

    def commit(self) -> None:
        state = {
            "step": self.step_number,
            "extra": self.extra,
            "optimizer": self._optimizer.state_dict(),
            "masters": [m.detach() for m in self._masters],
        }
        part = self._file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self._file)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def _sum(self, batch: MicroBatch) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = self.model(use_cache=False, **inputs).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
        )


@contextmanager
def plain_finetuning(
    model: str | Path,
    *,
    method: str,
    optimizer: str,
    learning_rate: float,
    max_grad_norm: float | None,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    offload_dir: str | Path,
    seed: int,
    resume: bool,
    tokens: int,
    cpu_memory: str | None = None,
) -> Iterator[PlainTrainer]:
    """offload.finetuning's stand-in; budgets mean nothing to it."""
    assert (method, optimizer) == ("full", "adamw")
    folder = Path(offload_dir)
    folder.mkdir(parents=True, exist_ok=True)
    yield PlainTrainer(
        model, folder, resume=resume, seed=seed, max_grad_norm=max_grad_norm, learning_rate=learning_rate,
        betas=betas, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
