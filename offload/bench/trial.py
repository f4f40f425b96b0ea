"""One cell, measured in a process of its own, which bench/planning.py starts.

What the run predicts for itself, with the disk's rate of that moment, is appended to the ledger before anything is
generated. Then it generates several times; a token takes the median of these rounds. Where that is asked, the disk is
measured again afterwards; what the same prices make of the mean of both rates is no prediction, but shows how much of
an error was the disk's.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch

from offload.api import load
from offload.bench.ledger import Ledger
from offload.generate import Generated, generate
from offload.handle import Offloaded
from offload.hardware import peak_rss_bytes
from offload.plan import predict_run
from offload.plan.residuals import residuals
from offload.planner.prediction import Prediction
from offload.profile import Profile
from offload.runtime.linears import unpack_nbytes
from offload.specs import Workload

FIRST_ID = 5  # of random prompts: smaller ones may mean something


def trial(asked: dict[str, Any]) -> dict[str, Any]:
    """Loads, predicts, generates, and tells.

    Args:
        asked: cell, model, cpu_memory, gpu_memory, link (bytes per second or None), batch, context, new_tokens, rounds,
            plan (a file), ledger (a file, or None), visit (which process of the cell it is), looks_back.
    """
    model, batch, context, steps = Path(asked["model"]), asked["batch"], asked["context"], asked["new_tokens"]
    handle = load(
        model,
        cpu_memory=asked["cpu_memory"],
        gpu_memory=asked["gpu_memory"],
        device="emulated" if asked["link"] else "cpu",
        link=asked["link"],
        batch=batch,
        context=context + steps,
        prompt_tokens=context,
        plan=asked["plan"],
    )
    with handle:
        before = handle.measure_disk()
        handle.measure_products()
        prediction, profile = expect(handle, model, handle.work)
        if asked["ledger"] is not None:
            line = {"kind": "at start", "cell": asked["cell"], "visit": asked["visit"], "disk_bytes_per_s": before}
            Ledger(Path(asked["ledger"])).add(line | prediction.as_dict())
        runs: list[Generated] = []
        left: dict[str, list[float]] = {}
        for number in range(asked["rounds"]):
            run, found = observe(handle, prediction, profile, handle.work, is_first=not number)
            runs.append(run.bounded(disk_bytes_per_s=handle.disk_bytes_per_s, link_bytes_per_s=handle.link_bytes_per_s))
            for family, value in found.items():
                left.setdefault(family, []).append(value)
        each = [run.decode_s_per_token or 0.0 for run in runs]
        seconds, peak = median(each), peak_rss_bytes()
        back = _look_back(handle, model, before) if asked["looks_back"] else {}
        return {
            "prefill_s": runs[0].prefill_s,
            "prefills_s": [run.prefill_s for run in runs],
            "decode_s_per_token": seconds,
            "decodes_s_per_token": each,
            "tokens_per_s": batch / seconds,
            "peak_rss_bytes": peak,
            "device_peak_bytes": handle.session.statistics().device_peak_bytes,
            "binding": runs[0].bound.binding,
            "read_bytes_per_token": round(runs[0].read_bytes_per_token),
            "upload_bytes_per_token": round(runs[0].upload_bytes_per_token),
            "disk_bytes_per_s": before,
            **back,
            "ready_s": handle.ready_s,
            "residuals": {family: median(values) for family, values in left.items()},
            "fallbacks": list(handle.fallbacks),
        }


def _look_back(handle: Offloaded, model: Path, before: float | None) -> dict[str, Any]:
    """The disk's rate after a run, and what the run should have taken at the mean of both."""
    after = handle.measure_disk()
    if before is not None and after is not None:
        handle.disk_bytes_per_s = 2 / (1 / before + 1 / after)  # as many bytes at one as at the other
    hindsight, _ = expect(handle, model, handle.work, remembers=False)
    return {"disk_after_bytes_per_s": after, "hindsight_s_per_token": hindsight.decode_s_per_token}


def expect(handle: Offloaded, model: Path, work: Workload, *, remembers: bool = True) -> tuple[Prediction, Profile]:
    """What a loaded model is predicted to do, on the machine as it is now."""
    found = predict_run(
        handle.spec,
        handle.division,
        handle.budgets,
        work,
        model=model,
        device=handle.session.device.name,
        exact=False,
        link_bytes_per_s=handle.link_bytes_per_s,
        disk_bytes_per_s=handle.disk_bytes_per_s,
        products=handle.products,
        extra_nbytes=unpack_nbytes(handle.session.store.sources.values(), False),
        remembers=remembers,
    )
    assert found is not None, "a CPU is in every profile"
    return found


def observe(
    handle: Offloaded, prediction: Prediction, profile: Profile, work: Workload, *, is_first: bool
) -> tuple[Generated, dict[str, float]]:
    """Generates from random prompts; the run, and how far it was from its prediction."""
    numbers = torch.Generator().manual_seed(0)
    vocabulary = int(handle.model.config.get_text_config(decoder=True).vocab_size)
    prompts = torch.randint(FIRST_ID, vocabulary, (work.batch, work.prompt_tokens), generator=numbers).tolist()
    handle.session.timeline.reset()
    run = generate(
        handle.model,
        handle.session,
        prompts,
        new_tokens=work.total_tokens - work.prompt_tokens,
        stop_at_eos=False,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    left = residuals(
        prediction,
        profile.learned,
        work,
        handle.division.placement,
        handle.session.timeline.spans,
        run.prefill_s,
        run.token_s,
        is_first=is_first,
    )
    return run, left
