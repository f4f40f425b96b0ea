"""The decode benchmark's aggregation: the ceiling of a run, medians of ratios, verdicts, and what is missing."""

from typing import Any

import pytest
from report import number, scrub, table
from tables import ACCELERATE, AIRLLM, DISK, LLAMACPP, OURS, checks, checks_table, decode_table, doubts, samples
from tables import same_tokens as agreement

GB = 10**9
LIMIT, MODEL = 4 * GB, 6 * GB


def disk(k: int, rate: float) -> dict[str, Any]:
    return {"system": DISK, "batch": None, "round": k, "exit": 0, "mean_read_bytes_per_s": rate} | quiet()


def quiet() -> dict[str, Any]:
    return {"wall_s": 20.0, "other_cpu_s": 0.1, "written_bytes": 0}


def ours(k: int, step_s: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    line = {"system": OURS, "batch": batch, "round": k, "exit": 0, "decode_s_per_token": step_s, "prefill_s": step_s}
    line |= {"read_bytes_per_token": 2 * GB, "streamed_bytes": 2.5 * GB, "resident_bytes": 4 * GB, "ready_s": 2.5}
    return line | {"peak_rss_bytes": 3 * GB, "disk_bytes_per_s": GB, "tokens": [[5, 6, 7, 8]]} | quiet() | more


def other(system: str, k: int, step_s: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    line = {"system": system, "batch": batch, "round": k, "exit": 0, "decode_s_per_token": step_s, "prefill_s": step_s}
    line |= {"decode_read_bytes_per_token": 5 * GB, "load_s": 9.0, "peak_rss_bytes": GB, "tokens": [5, 6, 0, 8]}
    return line | quiet() | more


def check(lines: list[dict[str, Any]], name: str) -> Any:
    return next(c for c in checks(lines, limit_bytes=LIMIT, model_bytes=MODEL) if c.name.startswith(name))


def test_the_ceiling_is_that_of_the_disk_lines_on_both_sides_in_the_same_round() -> None:
    lines = [disk(0, 2 * GB), ours(0, 1.0), disk(0, 4 * GB), disk(1, GB), ours(1, 1.0)]
    first, second = samples(lines)
    assert first.ceiling == pytest.approx(2 / (1 / 2 + 1 / 4) * GB)  # all bytes over all seconds
    assert second.ceiling == pytest.approx(GB)


def test_without_disk_lines_our_own_measurement_serves() -> None:
    assert samples([ours(0, 1.0)])[0].ceiling == GB
    assert samples([other(ACCELERATE, 0, 1.0)])[0].bound_s is None


def test_reading_more_than_must_stream_does_not_loosen_the_bound() -> None:
    lines = [disk(0, GB), ours(0, 3.0, read_bytes_per_token=3 * GB)]
    assert samples(lines)[0].bound_s == pytest.approx(2.5)


def test_ratios_are_taken_within_a_round_before_the_median() -> None:
    slow = [disk(0, GB), ours(0, 4.0), other(LLAMACPP, 0, 16.0)]  # the disk's slow spell hits both
    fast = [disk(1, 4 * GB), ours(1, 1.0), other(LLAMACPP, 1, 4.0)]
    assert check(slow + fast, "faster than llama.cpp mmap, batch 1").value == pytest.approx(4.0)
    assert check(slow + fast, "step over the bound, batch 1").value == pytest.approx(2.0)


def test_figures_pass_and_fail_against_their_targets() -> None:
    lines = [disk(0, 2 * GB), ours(0, 1.1), ours(0, 1.4, batch=32), disk(0, 2 * GB), other(ACCELERATE, 0, 3.0)]
    assert check(lines, "step over the bound, batch 1").passed is True
    assert check(lines, "faster than accelerate, batch 1").passed is False
    assert check(lines, "tokens/s, batch 32").value == pytest.approx(32 * 1.1 / 1.4)
    assert check(lines, "read per token").passed is True
    assert check(lines, "prefill over a decode step, batch 1").passed is True
    assert check(lines, "step over the bound, batch 32").verdict == ""  # information: no target


def test_what_was_not_measured_is_said_and_neither_passes_nor_fails() -> None:
    lines = [disk(0, GB), ours(0, 2.0), other(AIRLLM, 0, 9.0, exit=1, decode_s_per_token=None)]
    assert check(lines, "faster than AirLLM").passed is None
    assert check(lines, "faster than AirLLM").verdict == "not measured"
    text = decode_table(lines, [(OURS, 1), (LLAMACPP, 1), (AIRLLM, 1)])
    assert "not measured" in text
    assert "0 of 1" in text
    assert checks_table([check(lines, "faster than AirLLM")]).count("not measured") == 1


def test_doubts_name_failures_kills_and_busy_neighbours() -> None:
    lines = [ours(0, 1.0, exit=1), ours(1, 1.0, other_cpu_s=5.0), ours(2, 1.0, cgroup={"oom_kills": 1}), ours(3, 1.0)]
    said = "\n".join(doubts(lines))
    assert [f"round {k}" in said for k in range(4)] == [True, True, True, False]


def test_agreement_of_tokens_counts_from_the_first() -> None:
    assert agreement([ours(0, 1.0), other(ACCELERATE, 0, 1.0)]) == {"accelerate, batch 1": "2 of 4"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("/a/b/model", "model"), ("at 4 GB/s", "at 4 GB/s"), ("in /x/y.py, line 3", "in y.py, line 3"), (7, 7)],
)
def test_results_name_no_folders(text: object, expected: object) -> None:
    assert scrub({"k": [text]}) == {"k": [expected]}


def test_figures_keep_their_digits_and_columns_line_up() -> None:
    assert [number(x) for x in (None, 0, 0.12345, 12345.6, 2.0)] == ["", "0", "0.123", "12346", "2"]
    lines = table(["a", "b"], [["long name", "1"], ["x", "123456"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
