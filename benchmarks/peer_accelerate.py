"""Greedy decoding with transformers, in memory or with accelerate's offload, on a GPU or without: one JSON line.

    python benchmarks/peer_accelerate.py MODEL --place resident                    # everything where it computes
    python benchmarks/peer_accelerate.py MODEL --place disk --cpu-mem 2500MiB      # no GPU: what fits, the rest on disk
    python benchmarks/peer_accelerate.py MODEL --device cuda --place host --gpu-memory 2000000000
    python benchmarks/peer_accelerate.py MODEL --device cuda --place disk --gpu-memory 2000000000

--gpu-memory makes the card that small: torch may allocate no more. Accelerate gets it for weights, less --headroom for
activations, keys and values. Every sequence of a batch has the same prompt, as in `offload run --batch`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from report import SCRATCH, checkpoint_bytes

PLACES = ("resident", "host", "disk")


def arguments() -> argparse.Namespace:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ap.add_argument("--place", choices=PLACES, default="resident", help="where weights lie that do not fit")
    ap.add_argument("--gpu-memory", type=int, help="bytes that torch may allocate on the GPU; default: all it has")
    ap.add_argument("--headroom", type=int, default=256 << 20, help="of them, bytes that are not for weights")
    ap.add_argument("--cpu-mem", default="0", help="main memory for weights with --place disk, as accelerate spells it")
    ap.add_argument("--batch", type=int, default=1)
    ap.add_argument("--prompt", type=int, default=32, help="prompt tokens: the ids from 3 on")
    ap.add_argument("--new", type=int, default=16, help="new tokens per sequence")
    return ap.parse_args()


def placement(a: argparse.Namespace) -> dict[str, Any]:
    """What from_pretrained is told about places."""
    if a.place == "resident":
        return {"device_map": {"": 0 if a.device == "cuda" else "cpu"}}
    memory: dict[int | str, Any] = {"cpu": a.cpu_mem if a.place == "disk" else "1TB"}
    if a.device == "cuda":
        memory[0] = max(0, a.gpu_memory - a.headroom)
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(SCRATCH / "accelerate")}


def read_bytes() -> int:
    """Bytes this process made the disk read; page-cache hits do not count."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def decode(model: Any, ids: Any, new: int) -> dict[str, Any]:
    """Greedy tokens, and the clock and the disk counter read after each of them."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    marks = []

    class Mark(StoppingCriteria):
        """Never stops; generate() calls it after every token."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            input_ids[0, -1].item()  # the GPU has really made it
            marks.append((time.perf_counter(), read_bytes()))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    begin = time.perf_counter(), read_bytes()
    with torch.no_grad():
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Mark()]),
        )
    token_s = [b[0] - a[0] for a, b in pairwise(marks)]
    return {
        "tokens": [row[ids.shape[1] :].tolist() for row in rows],
        "prefill_s": marks[0][0] - begin[0],
        "prefill_read_bytes": marks[0][1] - begin[1],
        "decode_s_per_token": sum(token_s) / len(token_s),
        "decode_s_per_token_median": median(token_s),
        "token_s": token_s,
        "decode_read_bytes_per_token": (marks[-1][1] - marks[0][1]) // len(token_s),
    }


def main() -> None:
    a = arguments()
    if a.place != "resident" and a.device == "cuda" and not a.gpu_memory:
        raise SystemExit("--place host and disk need --gpu-memory: how large is the card?")
    import accelerate
    import torch
    import transformers

    where = torch.device("cuda:0" if a.device == "cuda" else "cpu")
    if a.device == "cuda" and a.gpu_memory:
        torch.cuda.set_per_process_memory_fraction(min(1.0, a.gpu_memory / torch.cuda.mem_get_info()[1]))
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype="auto", **placement(a))
    load_s = time.perf_counter() - began
    ids = torch.tensor([list(range(3, 3 + a.prompt))] * a.batch, device=where)
    result = decode(model, ids, a.new)
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    facts = {
        "system": "transformers" if a.place == "resident" else "accelerate",
        "version": f"{accelerate.__version__} / transformers {transformers.__version__} / torch {torch.__version__}",
        "place": a.place,
        "device": str(where),
        "checkpoint_bytes": checkpoint_bytes(a.model),
        "batch": a.batch,
        "threads": torch.get_num_threads(),
        "disk_modules": places.count("disk"),
        "host_modules": places.count("cpu"),
        "load_s": load_s,
        "peak_rss_bytes": peak,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if a.device == "cuda" else 0,
    }
    print(json.dumps(facts | result), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
