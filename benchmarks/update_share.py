"""A share of the updates on the accelerator, replayed on the virtual clock with profiles of cards: no card is needed.

    python benchmarks/update_share.py
    python benchmarks/update_share.py --offload-dir DIR    # and steps that really run, on the emulated device

A Llama of 6.7 B parameters in bf16, AdamW, all state in main memory. The machines' figures are those of data sheets
(`offload/presets`), with cores and main memory as stated; nothing of this was measured on a card. The closed form knows
CPU, link and main memory alone; the clock replays the whole step, its computing included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from datetime import date
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from report import RESULTS, hardware, machine_line, number, table, write
from runner import announce, run
from training_emulated import made

from offload.checkpoint.outline import outline
from offload.finetune.accelerator import Accelerator
from offload.finetune.forecast import forecast
from offload.finetune.pricing import Batch
from offload.hardware import versions
from offload.kernels.chosen import Kernels
from offload.optim import make
from offload.planner.update_share import balanced_share, seconds_per_param
from offload.profile import Profile, preset
from offload.tiers.cells import SHARD_COUNT
from offload.units import GIB

MACHINES = {  # preset, bytes of main memory and of the card to use, bytes a second of main memory; None: the preset's
    "RTX 4090, desktop of 62 GB/s": ("rtx4090-gen4-nvme4", 22, None),
    "RTX 4090, a server's memory of 250 GB/s": ("rtx4090-gen4-nvme4", 22, 250e9),
    "RTX 5090, desktop": ("rtx5090-gen5-nvme5", 30, None),
    "A100, 24 cores": ("a100-gen4-nvme4x4", 70, None),
    "H100, server": ("h100-gen5-nvme5x4", 70, None),
}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS, TOKENS = 8, 1024
LANES = ("upload", "download", "compute", "update", "aside")


def spec() -> Any:
    """Llama-2-7B's shapes."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, tie_word_embeddings=False, dtype="bfloat16",
        ).save_pretrained(folder)  # fmt: skip
        return outline(Path(folder), None).spec


def machine(name: str, bytes_per_s: float | None) -> Profile:
    """A preset whose main memory is as fast as said; updates of its CPU stay as they are."""
    found = preset(name)
    return found if bytes_per_s is None else replace(found, shared={"dram": bytes_per_s})


def lines() -> list[dict[str, Any]]:
    rule, model, found = make("adamw", Kernels("cpu", exact=False)), spec(), []
    for title, (name, card, memory) in MACHINES.items():
        profile = machine(name, memory)
        accelerator = Accelerator(name="cuda:0", memory=card * GIB)
        params_per_s = SHARD_COUNT / rule.cost.seconds(SHARD_COUNT, profile)
        kept = min(profile.kept("h2d", "d2h"), profile.kept("d2h", "h2d"))
        link = kept * profile.lane("h2d").rate(12 * SHARD_COUNT)
        form = {"memory_bytes_per_s": profile.shared.get("dram", inf)}
        for clips in (True, False):
            given: dict[str, Any] = {
                "batch": Batch(rows=ROWS, tokens=TOKENS), "clips": clips, "budget": 160 * GIB, "base": GIB,
                "accelerator": accelerator,
            }  # fmt: skip
            costs = {f: forecast(model, rule, profile, update_share=f, **given).cost for f in SHARES}
            best = forecast(model, rule, profile, update_share=None, **given)
            found.append({
                "machine": title, "clips": clips, "params_per_s": params_per_s, "link_bytes_per_s": link,
                "formula": balanced_share(params_per_s, link), "chosen": best.update_share,
                "step_s": {str(f): cost.seconds for f, cost in costs.items()}, "chosen_s": best.cost.seconds,
                "lanes_s": {"0": costs[0.0].lanes_s, "chosen": best.cost.lanes_s},
                "closed_form_gain": seconds_per_param(0.0, params_per_s, link, **form)
                / seconds_per_param(best.update_share, params_per_s, link, **form),
            })  # fmt: skip
            print(found[-1], file=sys.stderr)
    return found


def emulated(folder: Path) -> list[dict[str, Any]]:
    """Steps that run, a line for each share: what is made there has the bits of what is made here, and costs the same
    cores."""
    folder.mkdir(parents=True, exist_ok=True)
    model, found = made(), []
    for clip in ("1", "0"):
        for share in ("0", "0.5", "1"):
            command = [sys.executable, "benchmarks/train_steps.py", str(model), "--device", "emulated", "--clip", clip]
            command += ["--gpu-memory", "700MiB", "--link", "8GB/s", "--resident", "1.0", "--length", "16"]
            command += ["--batch", "1", "--steps", "8", "--cpu-memory", "6GiB", "--update-share", share]
            line = run([*command, "--offload-dir", str(folder / "state")], timeout_s=60)
            announce(line, f"clip {clip}, share {share}")
            found.append(line | {"clip": clip, "share": share})
    return found


def measured(lines: list[dict[str, Any]], where: str) -> str:
    """The table of steps that ran."""
    rows = []
    for x in lines:
        busy = {lane: median(step.get(lane, 0.0) for step in x["busy_s"][2:]) for lane in LANES}
        figures = [median(x["step_s"][2:]), *busy.values(), x["upload_bytes"] / 1e9, x["download_bytes"] / 1e9]
        loss = next(y["loss"] for y in lines if y["clip"] == x["clip"])
        is_same = "yes" if x["loss"] == loss else "NO"
        rows.append([x["share"], "yes" if x["clip"] == "1" else "no", *map(number, figures), is_same])
    header = ["share", "clipping", "s/step", *(f"{lane}, s" for lane in LANES), "GB up", "GB down", "losses of share 0"]
    return "\n".join([
        "## Steps that ran, on the emulated device\n",
        f"{where}. A Llama of {lines[0]['params'] / 1e6:.0f} M parameters in bf16, 16 tokens a step, all cells with a "
        "place on the device, a link of 8 GB/s each way; medians of 6 steps. The device computes on the same two cores "
        "as the CPU's updates, so no share can be faster here: what crosses is shown, and that losses are equal.\n",
        table(header, rows),
        "",
    ])  # fmt: skip


def page(result: dict[str, Any]) -> str:
    header = ["machine", "clipping", "updates, G/s", "link, GB/s", "f* of the formula", "share 0, s"]
    header += [f"{f:g}" for f in SHARES[1:]] + ["chosen share", "s", "x share 0", "updates alone, closed form"]
    rows = []
    for x in result["lines"]:
        figures = [x["params_per_s"] / 1e9, x["link_bytes_per_s"] / 1e9, x["formula"]]
        figures += [x["step_s"][str(f)] for f in SHARES]
        figures += [x["chosen"], x["chosen_s"], x["step_s"]["0.0"] / x["chosen_s"], x["closed_form_gain"]]
        rows.append([x["machine"], "yes" if x["clips"] else "no", *map(number, figures)])
    return "\n".join([
        f"# A share of the updates on the accelerator: what the virtual clock says, {result['date']}\n",
        "Predictions, not measurements: no card has run this. Machines are presets made of data sheets, with 160 GiB "
        f"of main memory whatever they have. A Llama of 6.7 B parameters in bf16, {ROWS} x {TOKENS} tokens a step, "
        "AdamW with float32 states, all in main memory; seconds a step by share of the updates that the card makes.\n",
        table(header, rows),
        "The last column is the closed form's gain for the updates by themselves (`offload/planner/update_share.py`), "
        "with main memory's bound: a share moves 24 bytes a parameter through it in place of 28. With clipping updates "
        "run ahead of the next forward, otherwise behind the backward.\n",
    ])  # fmt: skip


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--offload-dir", type=Path, help="a folder on a disk, for steps that run")
    ap.add_argument("--out", type=Path, default=RESULTS)
    a = ap.parse_args()
    result = {"date": date.today().isoformat(), "versions": versions(), "lines": lines()}
    text = page(result)
    if a.offload_dir is not None:
        result["emulated"] = emulated(a.offload_dir)
        text += "\n" + measured(result["emulated"], machine_line(hardware(a.offload_dir)))
    paths = write("update-share", result, text, a.out)
    print(f"\n{text}\n{paths[0]}\n{paths[1]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
