"""The schedules give the numbers of transformers', bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from offload.errors import UsageError
from offload.finetune.schedules import SCHEDULES, learning_rate, warmup_steps


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 7), (3, 20), (20, 20), (30, 20)])
def test_equal_to_transformers(name: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):
        assert learning_rate(name, 3e-4, step, warmup=warmup, total=total) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_warm_up_as_a_share() -> None:
    for value in (0, 0.1, 0.25, 1, 10):
        arguments = SimpleNamespace(warmup_steps=value)  # a TrainingArguments cannot be made without accelerate
        assert warmup_steps(value, 33) == transformers.TrainingArguments.get_warmup_steps(arguments, 33)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="constant_with_warmup, linear, cosine"):
        learning_rate("cosinus", 1e-3, 0, warmup=0, total=1)
