"""What a prediction says: seconds, bytes and memory of both phases, by the names that runs are measured under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, sqrt
from typing import Any

from offload.planner.bound import Bound

NINE_OF_TEN = 1.645  # standard deviations to both sides
SIGMA_OF_MAD = 1.4826  # a normal's standard deviation over its median distance from the median
ESTIMATE = 0.3  # relative deviation of a prediction whose machine was not measured


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """One phase: what its pass takes, and why.

    Attributes:
        seconds: of a pass; of many in the steady state for decoding, of the first for a prefill.
        bound: by resource, with the interference-free rates.
        stall_s: the model waits for bytes.
        serial_s: a pass in which nothing overlaps.
        spread_s: one standard spread of `seconds`, from those of its measurements.
        estimated: the part of the seconds of computing that no measured table gave.
        read_bytes, upload_bytes: of a pass.
        busy_s: lane -> seconds in which it works, slowed down by the others.
        once_s: of computing, what only the first pass takes.
    """

    seconds: float
    bound: Bound
    stall_s: float
    serial_s: float
    spread_s: float
    estimated: float
    read_bytes: int
    upload_bytes: int
    busy_s: Mapping[str, float] = field(default_factory=dict)
    once_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run will show; the names are those that `run --json` measures under.

    Attributes:
        prefill_s: from the start to the first new token.
        decode_s_per_token: of one later step, which makes a token of every sequence.
        tokens_per_s: of all sequences together, while decoding.
        peak_rss_bytes: of the process; the memory of an emulated device is part of it.
        device_peak_bytes: of the device's memory; 0 without one.
        read_bytes_per_token, upload_bytes_per_token: of one step.
        bound_s_per_token: no run can be faster, on this machine with this software.
        binding: which resource that is: disk, link or compute.
        interval: low and high of decode_s_per_token: nine runs of ten shall lie between them.
        prefill_interval: the same of prefill_s.
        origin: measured, or estimate where something that matters was not measured.
        calibrated_runs: runs on this machine whose residuals the prediction rests on; 0: it is not calibrated.
        prefill, decode: more of both phases.
    """

    prefill_s: float
    decode_s_per_token: float
    tokens_per_s: float
    peak_rss_bytes: int
    device_peak_bytes: int
    read_bytes_per_token: int
    upload_bytes_per_token: int
    bound_s_per_token: float
    binding: str
    interval: tuple[float, float]
    prefill_interval: tuple[float, float]
    origin: str
    calibrated_runs: int
    prefill: PassCost = field(repr=False)
    decode: PassCost = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "prefill_s": self.prefill_s,
            "decode_s_per_token": self.decode_s_per_token,
            "tokens_per_s": self.tokens_per_s,
            "peak_rss_bytes": self.peak_rss_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "read_bytes_per_token": self.read_bytes_per_token,
            "upload_bytes_per_token": self.upload_bytes_per_token,
            "bound_s_per_token": self.bound_s_per_token,
            "binding": self.binding,
            "interval": list(self.interval),
            "prefill_interval": list(self.prefill_interval),
            "origin": self.origin,
            "calibrated_runs": self.calibrated_runs,
        }


def origin_of(prediction: Prediction) -> str:
    """What it rests on, for a reader."""
    if prediction.origin != "measured":
        return "estimate: not all of it was measured"
    if not prediction.calibrated_runs:
        return "measured machine, not calibrated"
    return f"measured machine, calibrated by {prediction.calibrated_runs} run{'s' * (prediction.calibrated_runs > 1)}"


def interval_of(cost: PassCost, deviation: float, is_measured: bool) -> tuple[float, float]:
    """Between which nine runs of ten lie: how far predictions were off, and how far what they rest on spreads."""
    spread = SIGMA_OF_MAD * cost.spread_s / cost.seconds if cost.seconds else 0.0
    sigma = sqrt(deviation**2 + spread**2 + (0.0 if is_measured else ESTIMATE**2))
    return cost.seconds * exp(-NINE_OF_TEN * sigma), cost.seconds * exp(NINE_OF_TEN * sigma)
