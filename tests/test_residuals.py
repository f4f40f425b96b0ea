"""How far each lane of a run was from its prediction: by hand-made timelines."""

from __future__ import annotations

from math import log

import pytest

from offload.plan.residuals import residuals
from offload.planner.bound import Bound
from offload.planner.ops import Phase
from offload.planner.placement import NO_RING, Placement, Ring
from offload.planner.prediction import PassCost, Prediction, origin_of
from offload.profile import Learned
from offload.runtime.timeline import SPANS, Span
from offload.specs import Workload

WORK = Workload(batch=1, prompt_tokens=100, total_tokens=104)


def cost(seconds: float, compute_s: float, read_s: float) -> PassCost:
    return PassCost(
        seconds=seconds, bound=Bound(disk_s=read_s, compute_s=compute_s), stall_s=0.0, serial_s=compute_s + read_s,
        spread_s=0.0, estimated=0.0, read_bytes=1, upload_bytes=0, busy_s={"compute": compute_s, "read": read_s},
    )  # fmt: skip


def prediction(first: PassCost, later: PassCost) -> Prediction:
    return Prediction(
        prefill_s=first.seconds, decode_s_per_token=later.seconds, tokens_per_s=1 / later.seconds, peak_rss_bytes=0,
        device_peak_bytes=0, read_bytes_per_token=1, upload_bytes_per_token=0, bound_s_per_token=0.1, binding="disk",
        interval=(0.0, 1.0), prefill_interval=(0.0, 1.0), origin="measured", calibrated_runs=0, prefill=first,
        decode=later,
    )  # fmt: skip


def placement(slots: int) -> Placement:
    ring = Ring(slots, 1) if slots else NO_RING
    return Placement(home={}, tables=frozenset(), host_ring=ring, device_ring=NO_RING, bundles={})


def timeline() -> list[Span]:
    """A prefill of 1 s, then three tokens of 0.5 s each: 0.2 s of computing, reads of 0.3 s that overlap by 0.1."""
    spans = [Span("compute", "a", 10.0, 11.0, 0)]
    for k in range(3):
        at = 11.0 + k / 2
        spans += [Span("read", "a", at, at + 0.2, 1), Span("read", "b", at + 0.1, at + 0.3, 1)]
        spans += [Span("compute", "a", at + 0.3, at + 0.5, 0)]
    return spans


def found(learned: Learned, slots: int = 2, *, is_first: bool = True) -> dict[str, float]:
    said = prediction(cost(0.8, 0.5, 0.1), cost(0.4, 0.1, 0.3))
    return residuals(said, learned, WORK, placement(slots), timeline(), 1.0, [0.5] * 3, is_first=is_first)


def test_each_lane_has_its_own() -> None:
    assert found(Learned()) == pytest.approx(
        {
            "prefill": log(1.0 / 0.8), "decode": log(0.5 / 0.4), "compute.many.streaming": log(1.0 / 0.5), "read": 0.0,
        }
    ), "tokens wait for the disk: what computing takes beside it is not seen"  # fmt: skip
    assert "compute.many" in found(Learned(), slots=0)
    assert "prefill" not in found(Learned(), is_first=False)


def test_what_was_applied_is_taken_out_again() -> None:
    learned = Learned().with_run({"read": 0.2})
    assert found(learned)["read"] == pytest.approx(log(learned.factor("read")))


def test_a_timeline_that_forgot_the_beginning_teaches_nothing() -> None:
    said = prediction(cost(0.8, 0.5, 0.1), cost(0.4, 0.1, 0.3))
    full = timeline() * (SPANS // len(timeline()) + 1)
    assert residuals(said, Learned(), WORK, placement(2), full, 1.0, [0.5] * 3) == {}
    assert residuals(said, Learned(), WORK, placement(2), [], 1.0, [0.5] * 3) == {}


def test_a_prediction_says_what_it_rests_on() -> None:
    said = prediction(cost(0.8, 0.5, 0.1), cost(0.4, 0.1, 0.3))
    assert origin_of(said) == "measured machine, not calibrated"


@pytest.mark.parametrize(
    ("sequences", "tokens", "family"),
    [(4, 1, "few"), (5, 1, "some"), (1, 64, "some"), (1, 65, "many"), (2, 128, "many"), (1, 257, "bulk")],
)
def test_families_by_rows(sequences: int, tokens: int, family: str) -> None:
    """Products that compute more than they read stand apart: what slows reading down says nothing of them."""
    assert Phase(sequences=sequences, tokens=tokens).family == f"compute.{family}"
