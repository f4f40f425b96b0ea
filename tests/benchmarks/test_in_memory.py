"""The in-memory benchmark's aggregation: ratios within a round, what a step reads, and where no peer was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_memory import LLAMACPP, OURS, checks, decode_table, ratio, table_bytes

GB = 10**9


def line(system: str, weights: str, k: int, step_s: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    found = {"system": system, "weights": weights, "batch": batch, "round": k, "exit": 0, "step_bytes": 6 * GB}
    return found | {"token_s": [step_s, step_s, 9 * step_s], "read_rate": 60 * GB, "load_s": 1.0} | more


def test_ratios_are_taken_within_a_round_before_the_median() -> None:
    lines = [line(OURS, "none", 0, 0.1), line(LLAMACPP, "bf16", 0, 0.2)]
    lines += [line(OURS, "none", 1, 0.4), line(LLAMACPP, "bf16", 1, 0.8), line(OURS, "none", 2, 0.1)]
    assert ratio(lines, (OURS, "none"), (LLAMACPP, "bf16"), 1) == pytest.approx(2)
    assert ratio(lines, (OURS, "none"), (LLAMACPP, "bf16"), 4) is None


def test_targets_are_for_batch_1_and_what_was_not_measured_is_said() -> None:
    lines = [line(OURS, "none", 0, 0.2), line(LLAMACPP, "bf16", 0, 0.1), line(OURS, "none", 0, 0.2, 4)]
    lines.append(line(OURS, "int8", 0, 0.1, exit=1))
    verdicts = {check.name: check.verdict for check in checks(lines)}
    assert verdicts["bf16 over llama.cpp bf16, batch 1"] == "FAIL"
    assert verdicts["int8 over llama.cpp Q8_0, batch 1"] == "not measured"
    assert {check.target for check in checks(lines) if check.name.endswith("batch 4")} == {None}


def test_a_row_says_how_close_a_step_came_to_reading_memory() -> None:
    row = decode_table([line(OURS, "none", 0, 0.2)]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[4:9]] == ["0.2", "5", "6", "30", "0.5"]


def test_the_embedding_is_not_read_unless_it_is_the_head(tmp_path: Path) -> None:
    config = {"vocab_size": 1000, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert table_bytes(tmp_path, "Q4_0") == 36000
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert table_bytes(tmp_path, "Q4_0") == 0
