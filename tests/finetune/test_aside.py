"""A model that is saved where an older one lies: until the new one is whole, the older one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import same, weights
from models import MODELS
from test_full import batches

import offload
from offload.finetune.aside import PART, aside
from offload.io.engine import Engine

SINGLE = ["model.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("method", ["full", "lora", "zo"])
def test_the_older_model_stays_until_the_new_one_is_whole(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = MODELS["llama"].save(tmp_path / "model", torch.bfloat16), tmp_path / "out"
    with offload.finetuning(model, method=method, offload_dir=tmp_path / "state", learning_rate=1e-2) as mine:
        mine.save(out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        mine.step(batches(1, 2))

        def full(*unused: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr(Engine, "fsync", full)
            with pytest.raises(offload.StorageError, match="No space left on device"):
                mine.save(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        (out / PART).mkdir()  # what a kill leaves
        (out / PART / "torn").write_text("x")
        mine.save(out)
        assert {path.name for path in out.iterdir()} == before.keys()
        changed = {name for name, data in before.items() if (out / name).read_bytes() != data}
        assert changed == {"adapter_model.safetensors" if method == "lora" else "model.safetensors"}
        mine.save(tmp_path / "fresh")
        if method != "lora":
            assert same(weights(out), weights(tmp_path / "fresh"))


@pytest.mark.parametrize(("old", "new"), [(SINGLE, SHARDS), (SHARDS, SINGLE), (SHARDS, SHARDS), ([], SINGLE)])
def test_weights_of_the_older_model_go(old: list[str], new: list[str], tmp_path: Path) -> None:
    others = ["log.jsonl", "adapter_model.safetensors"]
    for name in (*old, *others):
        (tmp_path / name).write_text("old")
    with aside(tmp_path) as part:
        for name in (*new, "config.json"):
            (part / name).write_text(json.dumps("new"))
    assert {path.name for path in tmp_path.iterdir()} == {*new, *others, "config.json"}
    assert all((tmp_path / name).read_text() == '"new"' for name in new)
