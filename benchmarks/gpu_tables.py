"""From the lines of benchmarks/gpu.py to its page: what a step must take, what it took, which tokens agree. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_links import Rates, links_table, plateau
from report import machine_line, number, table

Line = dict[str, Any]
REFERENCE = "transformers, all on the GPU"


def summary(lines: Sequence[Line], rates: list[Rates], disk_bytes_per_s: float | None) -> list[dict[str, Any]]:
    """One entry for each line: step, lanes, bound, tokens equal to the reference's of the same batch."""
    reference = {line["batch"]: line for line in lines if line["job"] == REFERENCE and line["exit"] == 0}
    return [_entry(line, reference.get(line["batch"]), plateau(rates), disk_bytes_per_s) for line in lines]


def _entry(line: Line, plain: Line | None, link: float | None, disk: float | None) -> dict[str, Any]:
    entry = {"job": line["job"], "batch": line["batch"], "error": line.get("error")}
    if line["exit"] != 0:
        return entry
    disk = disk or line.get("disk_bytes_per_s")
    uploaded = line.get("upload_bytes_per_token")
    read = line.get("read_bytes_per_token", line.get("decode_read_bytes_per_token", 0))
    lanes = {
        "link": uploaded / link if uploaded and link else 0.0,
        "disk": read / disk if read and disk else 0.0,
        "compute": plain["decode_s_per_token_median"] if plain else 0.0,
    }
    step = line["decode_s_per_token_median"]
    slowest = max(lanes, key=lambda lane: lanes[lane])
    return entry | {
        "step_s": step,
        "tokens_per_s": line["batch"] / step,
        "uploaded_bytes": uploaded,
        "read_bytes": read,
        "lanes_s": lanes,
        "slowest": slowest,
        "over_bound": step / lanes[slowest] if lanes[slowest] and uploaded is not None else None,
        "gpu_peak_bytes": line.get("device_peak_bytes") or line.get("gpu_peak_bytes"),
        "peak_rss_bytes": line["peak_rss_bytes"],
        "load_s": line.get("ready_s", line.get("load_s")),
        "prefill_s": line["prefill_s"],
        "tokens_equal": line["tokens"] == plain["tokens"] if plain else None,
    }


def times(entries: Sequence[dict[str, Any]], slower: str, faster: str, batch: int) -> float | None:
    """How many times faster one job's step is than another's."""
    steps = {entry["job"]: entry.get("step_s") for entry in entries if entry["batch"] == batch}
    above, below = steps.get(slower), steps.get(faster)
    return above / below if above and below else None


def decode_table(entries: Sequence[dict[str, Any]]) -> str:
    header = ["job", "batch", "s/step", "tokens/s", "GB up/step", "GB read/step", "slowest lane, s", "slowest lane"]
    header += ["step / lane", "GPU peak, GB", "RSS peak, GB", "prefill, s", "load, s", "tokens equal"]
    rows = []
    for entry in entries:
        if "step_s" not in entry:
            rows.append([entry["job"], str(entry["batch"]), "not measured", *[""] * 11])
            continue
        figures = [(entry["step_s"], 1), (entry["tokens_per_s"], 1), (entry["uploaded_bytes"], 1e9)]
        figures += [(entry["read_bytes"], 1e9), (entry["lanes_s"][entry["slowest"]], 1)]
        more = [(entry["over_bound"], 1), (entry["gpu_peak_bytes"], 1e9), (entry["peak_rss_bytes"], 1e9)]
        more += [(entry["prefill_s"], 1), (entry["load_s"], 1)]
        first, second = ([number(value, 3, scale) for value, scale in part] for part in (figures, more))
        equal = {None: "", True: "yes", False: "NO"}[entry["tokens_equal"]]
        rows.append([entry["job"], str(entry["batch"]), *first, entry["slowest"], *second, equal])
    return table(header, rows)


def page(result: dict[str, Any]) -> str:
    entries, card = result["summary"], result["card_bytes"]
    ratios: list[tuple[str, float | None]] = []
    for batch in result["asked"]["batches"]:
        for place in ("host", "disk"):
            ours, where = f"offload, {place}, prefetch", f"{place}, batch {batch}"
            alone = times(entries, f"offload, {place}, no prefetch", ours, batch)
            theirs = times(entries, f"accelerate, {place}", ours, batch)
            ratios += [(f"prefetch over none, {where}", alone), (f"offload over accelerate, {where}", theirs)]
    disk = result["disk_bytes_per_s"]
    said = result["tests"]["output"].strip().splitlines()
    failed = [e for e in entries if e["error"]]
    wrong = [f"- {e['job']}, batch {e['batch']}: {e['error'].strip().splitlines()[-1]}\n" for e in failed]
    parts = [
        f"# Decode on a small GPU, {result['date']}\n",
        f"{machine_line(result['hardware'])}. Model: {result['model']}, {result['model_bytes'] / 1e9:.2f} GB; the card "
        f"is limited to {card / 1e9:.2f} GB. Prompt {result['asked']['prompt']} tokens, {result['asked']['new']} new. "
        + (f"Disk: {disk / 1e9:.2f} GB/s beside the runs" if disk else "Disk: as offload measured it")
        + f". GPU tests: {said[-1] if said else 'nothing was printed'}.\n",
        decode_table(entries),
        "The slowest lane is the largest of: bytes uploaded over the best pinned rate below, bytes read over the "
        "disk's rate, and a step of plain transformers with everything on the GPU, with whose tokens all "
        "others' are compared.\n",
        table(["faster by", "×"], [[what, number(value) or "not measured"] for what, value in ratios]),
        "Link rates, GB/s:\n",
        links_table(result["links"]),
    ]
    return "\n".join(parts + wrong)
