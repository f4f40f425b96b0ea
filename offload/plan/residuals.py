"""How far each lane of a run was from its prediction: what calibration learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log

from offload.planner.ops import decode, prefill
from offload.planner.placement import Placement
from offload.planner.predict import family_of
from offload.planner.prediction import PassCost, Prediction
from offload.profile import Learned
from offload.runtime.timeline import SPANS, Span
from offload.specs import Workload

LEAST_PART = 0.5  # of a pass: what lanes that are busy for less take is hidden, and says little of what others would
LEAST_STEPS = 3


def residuals(
    prediction: Prediction,
    learned: Learned,
    work: Workload,
    placement: Placement,
    spans: Iterable[Span],
    prefill_s: float,
    token_s: Sequence[float],
    *,
    is_first: bool = True,
) -> dict[str, float]:
    """Family -> logarithm of measured over predicted; what was applied already is taken out of the prediction.

    Args:
        learned: what the prediction was calibrated with.
        work, placement: what ran.
        spans: of the timeline, up to the end of the run.
        prefill_s, token_s: of the run.
        is_first: no run of the same rows went before in this process.
    """
    kept = list(spans)
    computing = [s for s in kept if s.lane == "compute"]
    if not computing or len(kept) >= SPANS:  # a full timeline has forgotten the beginning
        return {}
    end = max(s.end for s in computing)
    middle = end - sum(token_s)
    begin = middle - prefill_s
    found = {"prefill": log(prefill_s / prediction.prefill_s)} if is_first else {}
    first = family_of(placement, prefill(work))
    once = prediction.prefill.once_s if is_first else 0.0
    _compare(found, learned, first, prediction.prefill, "compute", _busy(kept, "compute", begin, middle) - once)
    steps = len(token_s)
    if steps < LEAST_STEPS:
        return found
    found["decode"] = log(sum(token_s) / steps / prediction.decode_s_per_token)
    later = family_of(placement, decode(work))
    for lane, family in (("compute", later), ("read", "read"), ("upload", "upload")):
        _compare(found, learned, family, prediction.decode, lane, _busy(kept, lane, middle, end) / steps)
    return found


def _compare(
    found: dict[str, float], learned: Learned, family: str, cost: PassCost, lane: str, measured_s: float
) -> None:
    predicted_s = cost.busy_s.get(lane, 0.0)
    if predicted_s > LEAST_PART * cost.seconds and measured_s > 0:
        found[family] = log(measured_s / predicted_s * learned.factor(family))


def _busy(spans: Iterable[Span], lane: str, begin: float, end: float) -> float:
    """Seconds between the two in which a lane had anything to do; what overlaps counts once."""
    total, until = 0.0, begin
    for span in sorted((s for s in spans if s.lane == lane), key=lambda s: s.start):
        start, stop = max(span.start, until), min(span.end, end)
        if stop > start:
            total += stop - start
            until = stop
    return total
