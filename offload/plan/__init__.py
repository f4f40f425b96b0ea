"""Plans: what a run would take and why, for models and machines that need not be here."""

from offload.plan.classes import tiers_of, totals
from offload.plan.machine import budgets_of, machine, with_disk_rate
from offload.plan.offline import plan_offline, room_for_one, work_of
from offload.plan.planning import Ask, Plan, Variant, best_batch, make, predicted_of
from offload.plan.process import NEAR, process_nbytes, remember_process
from offload.plan.roofline import roofline
from offload.plan.running import beside, predict_run
from offload.plan.saved import SavedPlan, adopt, digest, load_plan, save

__all__ = [
    "NEAR",
    "Ask",
    "Plan",
    "SavedPlan",
    "Variant",
    "adopt",
    "beside",
    "best_batch",
    "budgets_of",
    "digest",
    "load_plan",
    "machine",
    "make",
    "plan_offline",
    "predict_run",
    "predicted_of",
    "process_nbytes",
    "remember_process",
    "roofline",
    "room_for_one",
    "save",
    "tiers_of",
    "totals",
    "with_disk_rate",
    "work_of",
]
