"""`offload bench plan`: every prediction is on the disk before its cell is measured, and what is done stays done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import MODELS

from offload.bench import planning
from offload.bench.cells import TINY, grid, some
from offload.bench.ledger import Ledger, Line
from offload.bench.page import page
from offload.bench.planning import PlanBench, scattered
from offload.bench.regret import CHOSEN, CONTROL, OTHER, regret, turns
from offload.bench.scores import NOISE, drift, errors, scores
from offload.bench.trial import trial
from offload.bench.visits import agree, apart, by_cell, one_by_another, rounds_apart, together
from offload.errors import UsageError

CELLS = tuple(replace(c, keep=1.4) for c in grid(["llama"])[:8])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanBench:
    """A benchmark whose machine is not measured and whose runs take what was predicted, and a tenth more; the second
    process of a cell is a quarter slower than predicted, so that a third is asked."""
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "own_profile", lambda _: object())
    monkeypatch.setattr(planning, "_in_python", lambda *_: "400000000\n")
    ledger = Ledger(tmp_path / "plan.jsonl")

    def run(asked: Mapping[str, Any]) -> Line:
        known = ledger.of("predicted")[asked["cell"]]
        seconds = (1.25 if asked["visit"] == 1 else 1.1) * known["decode_s_per_token"]
        return {
            **{name: known[name] for name in ("peak_rss_bytes", "binding")},
            "prefill_s": known["prefill_s"] / 1.1,
            "decode_s_per_token": seconds,
            "decodes_s_per_token": [seconds] * asked["rounds"],
            "residuals": {"decode": 0.1},
        }

    return PlanBench(cells=CELLS, models=TINY, folder=tmp_path / "models", ledger=ledger, regrets=2, trial=run)


def test_the_grid() -> None:
    cells = grid()
    assert len(cells) >= 60
    assert len({c.name for c in cells}) == len(cells)
    assert sum(c.is_held_out for c in cells) >= 20
    few = some(cells, 12)
    assert len(few) == 12
    assert 3 <= sum(c.is_held_out for c in few) <= 6
    assert sorted(scattered(cells), key=cells.index) == list(cells)


def test_predictions_come_first(bench: PlanBench) -> None:
    bench.run()
    lines = bench.ledger.lines
    assert len(bench.ledger.of("measured")) == len(CELLS)
    for cell in CELLS:
        kinds = [line["kind"] for line in lines if line.get("cell") == cell.name and line["kind"] != "alternative"]
        assert kinds == ["predicted", *["calibrated"] * cell.is_held_out, *["measured"] * 3], "two do not agree"
    visits = [(line["visit"], line["cell"]) for line in lines if line["kind"] == "measured"]
    assert [visit for visit, _ in visits] == sorted(visit for visit, _ in visits), "all cells lie between two visits"
    last = max(k for k, line in enumerate(lines) if line["kind"] == "predicted")
    assert last < min(k for k, line in enumerate(lines) if line["kind"] == "measured")


def test_what_is_done_stays_done(bench: PlanBench) -> None:
    bench.run()
    before = bench.ledger.path.read_bytes()
    bench.run()
    assert bench.ledger.path.read_bytes() == before
    lines = before.splitlines(keepends=True)
    bench.ledger.path.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"kind": "measu')
    bench.ledger.reload()
    bench.run()
    assert len(bench.ledger.all_of("measured")) == 3 * len(CELLS)


def test_its_figures(bench: PlanBench) -> None:
    bench.run()
    found = scores(bench.ledger, CELLS)
    for kind in ("all cells, not calibrated", "held-out cells, calibrated by the fitted ones"):
        figures = found["errors"][kind]
        assert figures["tokens_per_s"]["mean"] == pytest.approx(0.1)
        assert figures["first_token"]["max"] == pytest.approx(0.1)
        assert figures["memory"] == [1.0, 1.0, 1.0]
        assert figures["binding_right"] == 1.0
        assert figures["interval_holds"] == 1.0
    other = found["errors"][NOISE]
    assert other["count"] == 2 * len(CELLS)
    assert other["tokens_per_s"]["mean"] == pytest.approx((1.25 / 1.1 - 1 + 1 - 1.1 / 1.25) / 2)
    assert found["each"][0]["apart"] == pytest.approx(0.15 / (3.45 / 3))
    assert found["noise"] == 0.0
    assert "held-out cells, sum of times" in found["errors"]
    text = page(found)
    assert all(cell.name in text for cell in CELLS)
    assert json.loads(json.dumps(found)) == found


def test_a_cell_that_fails_is_told(bench: PlanBench) -> None:
    bench.trial = lambda _: {"failed": "no memory"}
    bench.regrets = 0
    bench.run()
    found = scores(bench.ledger, CELLS)
    assert set(found["failed"].values()) == {"no memory"}
    assert "no memory" in page(found)


def test_errors() -> None:
    predicted = {"decode_s_per_token": 1.0, "prefill_s": 2.0}
    pairs: list[Any] = [(predicted, {"decode_s_per_token": m, "prefill_s": 2.0}) for m in (0.9, 1.0, 1.3)]
    assert errors(pairs)["tokens_per_s"] == pytest.approx({"mean": 0.4 / 3, "median": 0.1, "p95": 0.3, "max": 0.3})
    assert errors(pairs)["first_token"]["mean"] == 0


def test_regret_is_held_to_a_plan_beside_itself() -> None:
    """Medians of all rounds; the chosen plan's own include those of its control."""
    rounds = {(CHOSEN, "x"): [[1.1, 1.1], [1.3, 1.1]], (CONTROL, "x"): [[1.2, 1.2], [1.0, 1.2]]}
    rounds |= {(OTHER, "y"): [[1.0, 1.0], [0.9, 5.0]], (OTHER, "z"): [[1.5, 1.5], [1.5, 1.5]]}
    lines = [
        {"cell": "a", "role": role, "plan": plan, "decodes_s_per_token": each}
        for (role, plan), visits in rounds.items()
        for each in visits
    ]
    found = regret(lines)
    assert found is not None
    assert found["mean"] == found["max"] == pytest.approx(0.15)
    assert found["control"] == pytest.approx(1.2 / 1.1 - 1)
    assert regret([{"cell": "a", "failed": "x"}]) is None
    assert turns("ab") == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_visits_of_a_cell_are_one_figure() -> None:
    visits: list[Line] = [
        {"cell": "a", "decode_s_per_token": 1.0, "decodes_s_per_token": [0.9, 1.0, 3.0], "prefill_s": 2.0},
        {"cell": "a", "decode_s_per_token": 1.2, "decodes_s_per_token": [1.1, 1.3], "prefill_s": 4.0},
    ]
    for visit, peak in zip(visits, (7, 8), strict=True):
        visit["peak_rss_bytes"] = peak
    found = together(visits)
    assert [found[n] for n in ("decode_s_per_token", "prefill_s", "peak_rss_bytes")] == [1.1, 3.0, 8]
    third = visits[0] | {"decode_s_per_token": 5.0, "prefill_s": 9.0}
    assert together([*visits, third])["decode_s_per_token"] == 1.2, "a slow spell is outvoted"
    assert not agree(visits)
    assert agree([visits[0], visits[0] | {"prefill_s": 2.1}])
    assert one_by_another(by_cell([*visits, {"cell": "b", "failed": "x"}])) == [(visits[0], visits[1])]
    assert apart(visits) == pytest.approx(0.2 / 1.1)
    assert apart(visits[:1]) is None
    assert rounds_apart(visits) == pytest.approx((2.1 / (4.9 / 3) + 0.2 / 1.2) / 2)


def test_drift_tells_the_disk_from_the_model() -> None:
    """The profile knew a disk of 4 GB/s; it had 2 before the run and after it. A token took 1.1 times as long."""
    before, at_start = {"decode_s_per_token": 0.5, "disk_bytes_per_s": 4e9}, {"decode_s_per_token": 1.0}
    measured: Line = {"cell": "a", "decode_s_per_token": 1.1, "hindsight_s_per_token": 1.0, "disk_bytes_per_s": 2e9}
    found = drift(before, at_start, measured | {"disk_after_bytes_per_s": 2e9})
    assert found["disk"] == [4e9, 2e9, 2e9]
    assert found["errors"] == pytest.approx([0.5 / 1.1 - 1, 1 / 1.1 - 1, 1 / 1.1 - 1])
    assert found["explains"]


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_text("something else\n")
    with pytest.raises(UsageError, match="line 1"):
        Ledger(file)
    assert file.read_text() == "something else\n"


def test_a_real_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    folder = MODELS["llama"].save(tmp_path / "model")
    asked = {"cell": "one", "model": str(folder), "cpu_memory": "8GiB", "gpu_memory": None, "link": None, "batch": 2}
    asked |= {"context": 8, "new_tokens": 5, "rounds": 2, "plan": None, "ledger": str(tmp_path / "ledger.jsonl")}
    asked |= {"visit": 0, "looks_back": True}
    found = trial(asked)
    assert len(found["decodes_s_per_token"]) == 2
    assert {"prefill", "decode"} <= set(found["residuals"])
    assert [line["kind"] for line in Ledger(tmp_path / "ledger.jsonl").lines] == ["at start"]
