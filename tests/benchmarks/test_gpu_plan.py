"""What the accelerator benchmarks decide without an accelerator: jobs, deadlines, lanes, verdicts."""

import time
from pathlib import Path
from typing import Any

import emulated
import gpu
import gpu_links
import gpu_tables
import pytest
import soak

RATES = [{"nbytes": 1 << 20, "pinned": True, "up_bytes_per_s": 20e9, "down_bytes_per_s": 18e9}]


def line(job: str, step_s: float, **more: Any) -> dict[str, Any]:
    found = {"job": job, "batch": 1, "exit": 0, "decode_s_per_token_median": step_s, "tokens": [[1, 2]]}
    return found | {"prefill_s": 1.0, "peak_rss_bytes": 1} | more


def test_every_batch_has_a_reference_both_places_prefetch_on_and_off_and_the_peer() -> None:
    jobs = gpu.decode_jobs(Path("model"), 1000, [1, 32], 4, 8)
    assert len({(job.name, job.batch) for job in jobs}) == len(jobs) == 18
    own = [job.command for job in jobs if job.name.startswith("offload")]
    assert all(command[command.index("--gpu-memory") + 1] == "1000" for command in own)
    assert sum("--cpu-share" in command for command in own) == 10, "one of six lets rates decide"
    assert [command[command.index("--slots") + 1] for command in own] == ["2", "2", "2", "1", "2", "1"] * 2
    assert sum("--resident" in command for command in own) == 4


def test_a_job_that_cannot_end_in_time_is_listed_as_not_run() -> None:
    jobs = [gpu.Job("late", 1, ["false"], expected_s=60.0)]
    (found,) = gpu.measure(jobs, time.monotonic() + 5)
    assert "not run" in found["error"]
    (entry,) = gpu_tables.summary([found], RATES, None)
    assert "not measured" in gpu_tables.decode_table([entry])


def test_the_largest_checkpoint_that_fits_is_made() -> None:
    assert [gpu.largest_size(x) for x in (50e9, 5e9)] == ["3b", "1b"]
    with pytest.raises(SystemExit, match="name one"):
        gpu.largest_size(1e6)


def test_a_step_is_held_against_its_slowest_lane_and_the_reference_tokens() -> None:
    lines = [
        line(gpu_tables.REFERENCE, 0.01),
        line("offload, host, prefetch", 0.22, upload_bytes_per_token=4e9),
        line("offload, host, no prefetch", 0.33, upload_bytes_per_token=4e9, tokens=[[1, 3]]),
        line("offload, disk, prefetch", 1.0, upload_bytes_per_token=4e9, read_bytes_per_token=4e9),
    ]
    reference, host, alone, disk = gpu_tables.summary(lines, RATES, 5e9)
    assert reference["over_bound"] is None
    assert (host["slowest"], host["over_bound"]) == ("link", pytest.approx(1.1))
    assert (disk["slowest"], disk["over_bound"]) == ("disk", pytest.approx(1.25))
    assert (host["tokens_equal"], alone["tokens_equal"]) == (True, False)
    assert gpu_tables.times([host, alone], alone["job"], host["job"], 1) == pytest.approx(1.5)
    result = {
        "summary": [reference, host, alone, disk],
        "card_bytes": 1,
        "asked": {"prompt": 1, "new": 1, "batches": [1]},
    }
    result |= {
        "hardware": {"cpu": "c", "cores": 1, "ram_bytes": 1, "gpus": [], "kernel": "k"},
        "date": "d",
        "model": "m",
    }
    text = gpu_tables.page(
        result | {"model_bytes": 1, "disk_bytes_per_s": None, "tests": {"output": "ok"}, "links": RATES}
    )
    assert "| NO |" in text.replace("  ", "")
    assert "not measured" in text  # accelerate did not run


def test_the_link_table_has_a_row_for_each_size_and_leaves_unknown_cells_empty() -> None:
    assert "18" in gpu_links.links_table(RATES)
    assert gpu_links.plateau(RATES) == 20e9
    assert gpu_links.plateau([]) is None


def test_the_emulated_bound_takes_computing_from_the_run_without_a_link() -> None:
    moved = {"upload_bytes_per_token": 2e9, "read_bytes_per_token": 0, "bound": {"compute_s": 9.0}, "exit": 0}
    lines = [
        moved | {"link": None, "slots": 2, "share": "0", "decode_s_per_token_median": 0.1},
        moved | {"link": "4GB/s", "slots": 2, "share": "0", "decode_s_per_token_median": 0.52},
        moved | {"link": "40GB/s", "slots": 2, "share": "0", "decode_s_per_token_median": 0.12},
    ]
    slow, fast = emulated.summary(lines)
    assert (slow["slowest"], slow["over_bound"]) == ("link", pytest.approx(1.04))
    assert (fast["slowest"], fast["over_bound"]) == ("compute", pytest.approx(1.2))
    assert [emulated.judged(entry) for entry in (slow, fast)] == ["pass", "FAIL"]
    assert emulated.judged({"over_bound": 0.5}) == "doubtful"


def test_growth_counts_from_the_first_stretch_and_slope_is_per_step() -> None:
    keys = ("steps", "rss_bytes", "open_files", "threads")
    readings = [
        dict(zip(keys, values, strict=True)) for values in ((50, 100, 8, 4), (100, 150, 8, 4), (150, 200, 9, 4))
    ]
    assert soak.growth(readings) == {"rss_bytes": 100, "open_files": 1, "threads": 0}
    assert soak.slope(readings) == pytest.approx(1.0)
