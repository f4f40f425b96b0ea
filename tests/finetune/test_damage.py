"""A byte of a committed state that is not what was written is found by the next run, which names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import MODELS
from test_full import B, batches

import offload
from offload.tiers.commit import MANIFEST

METHODS: dict[str, dict[str, Any]] = {
    "full": {"optimizer": "adafactor"},  # shards that follow matrices
    "lora": {"method": "lora", "lora": {"r": 2}},
    "zo": {"method": "zo"},
}


def committed_places(folder: Path, method: str) -> list[tuple[Path, int]]:
    """Bytes spread over everything that the commit names: all of the manifest, and its slots of the shards."""
    manifest = folder / MANIFEST
    size = manifest.stat().st_size
    found = [(manifest, at) for at in sorted({0, 63, 64, 65, 70, size // 3, size // 2, size - 2, size - 1})]
    if method == "zo":
        return found
    with offload.finetuning(folder.parent / "model", offload_dir=folder, resume=True, **METHODS[method]) as trainer:
        state = trainer.training.state
        for shard in list(state._shards.values())[:: max(1, len(state._shards) // 4)]:
            start = state._offset(shard, shard.slot or 0)
            found += [(folder / "state.bin", start + at) for at in (0, shard.nbytes // 2, shard.nbytes - 1)]
    return found


@pytest.mark.parametrize("method", list(METHODS))
def test_every_region_is_guarded(method: str, tmp_path: Path) -> None:
    MODELS["llama"].save(tmp_path / "model", B)
    options = {"offload_dir": tmp_path / "state", **METHODS[method]}
    with offload.finetuning(tmp_path / "model", **options) as trainer:
        for step in range(2):
            trainer.step(batches(step, 1))
        trainer.commit()
    for path, at in committed_places(tmp_path / "state", method):
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(offload.CheckpointError, match=path.name):
            offload.finetuning(tmp_path / "model", resume=True, **options)
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(byte)
    with offload.finetuning(tmp_path / "model", resume=True, **options) as trainer:
        assert trainer.step_number == 2
