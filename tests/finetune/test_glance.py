"""What is seen of a machine that nobody has probed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models import MODELS

from offload.checkpoint.numbers import numbers
from offload.finetune.glance import NOTE, glance
from offload.profile import preset


def test_a_measured_machine_stays_as_it_is_and_another_is_looked_at(tmp_path: Path) -> None:
    folder = MODELS["llama"].save(tmp_path / "model")
    spec, file = numbers(folder).spec, str(next(folder.glob("*.safetensors")))
    guessed = preset("cpu-ddr5-nvme4")
    measured = replace(guessed, source="measured")
    assert glance(measured, spec, 8, file) is measured
    seen = glance(guessed, spec, 8, file)
    assert (seen.notes, seen.source) == ((NOTE,), "estimate")
    assert all(seen.processors["cpu"].flops[name] > 0 for name in (spec.dtype, "float32"))
    assert seen.lane("read").bytes_per_s == seen.lane("write").bytes_per_s != guessed.lane("read").bytes_per_s
