"""What `offload finetune` is tried with: a tiny model, a few conversations, and a configuration of twelve steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import TALK
from tiny_text import save


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    for name, lines in (("chat.jsonl", TALK), ("eval.jsonl", TALK[:4])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "model": str(model),
        "data": {"train": str(tmp_path / "chat.jsonl"), "max_length": 64, "chat_template": "plain"},
        "train": {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2, "num_train_epochs": 2,
            "save_steps": 3, "report_to": "none",
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
