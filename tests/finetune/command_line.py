"""`offload finetune` and `offload plan` as called from a shell, and what a run leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offload.cli import main
from offload.finetune.journal import read_journal

TALK = [
    {
        "messages": [
            {"role": "user", "content": f"Which is number {k}?"},
            {"role": "assistant", "content": f"It is {k}."},
        ]
    }
    for k in range(23)
]


def finetune(*arguments: object) -> int:
    """The exit status."""
    return _status("finetune", *arguments)


def plan(*arguments: object) -> int:
    """The exit status."""
    return _status("plan", *arguments)


def _status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return int(end.value.code or 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def facts(folder: Path) -> list[Any]:
    """The journal without what depends on the clock or on free memory."""
    timed = {"step_s", "predicted_step_s", "tokens_per_s", "peak_rss_bytes", "eval_s", "read_bytes", "write_bytes"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_journal(folder / "log.jsonl")]
