"""What a run will show, predicted from its own placement just before it generates; and measured figures beside that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from offload.budgets import Division
from offload.plan.machine import machine, with_disk_rate, with_product_rate
from offload.plan.planning import Ask, predict
from offload.plan.process import remember_process
from offload.planner.predict import Pricer
from offload.planner.prediction import Prediction
from offload.profile import Profile
from offload.specs import Budgets, ModelSpec, Products, Workload

NO_LINK = 1e15  # bytes per second of an emulated link without a pace


def predict_run(
    spec: ModelSpec,
    division: Division,
    budgets: Budgets,
    work: Workload,
    *,
    model: Path,
    device: str,
    exact: bool,
    link_bytes_per_s: float | None,
    disk_bytes_per_s: float | None,
    products: Products | None = None,
    extra_nbytes: int = 0,
    remembers: bool = True,
) -> tuple[Prediction, Profile] | None:
    """A prediction and the machine it is for; None where nothing is known of the device. Remembers the process's size.

    Args:
        division: where the memory goes, and every tensor.
        model: the checkpoint's folder: a profile may have been measured for it.
        device: cpu, emulated or cuda:N.
        disk_bytes_per_s: the disk's rate as it was measured just now; None: the profile's.
        products: what products with weights in memory took just now; None: what the profile's tables say.
        extra_nbytes: what unpacking takes beside the workspace.
        remembers: what this process takes before any weight, for plans; not where it has done other things before.
    """
    if remembers:
        remember_process(division.base_nbytes, exact)
    profile = with_disk_rate(machine(None, model), disk_bytes_per_s)
    ask = Ask(spec=spec, profile=profile, budgets=budgets, work=work, exact=exact, extra_nbytes=extra_nbytes)
    computer = ask.computer
    if device == "emulated":
        computer = replace(computer, processor="cpu", link_bytes_per_s=link_bytes_per_s or NO_LINK)
    if computer.processor not in profile.processors:
        return None
    if products is not None and profile.source == "measured" and computer.processor == "cpu":
        profile = with_product_rate(profile, products, exact)
        computer = replace(computer, profile=profile)
        ask = replace(ask, profile=profile)
    prediction = predict(Pricer(spec, work, computer), division.placement, division, ask)
    return prediction, profile


def beside(prediction: Prediction, measured: dict[str, Any]) -> dict[str, float]:
    """How far measured figures are from predicted ones, relative to what was measured, by name."""
    found = {}
    for name, value in prediction.as_dict().items():
        other = measured.get(name)
        if isinstance(value, int | float) and isinstance(other, int | float) and other:
            found[name] = value / other - 1
    return found
