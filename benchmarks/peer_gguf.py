"""Quantises a GGUF file by llama.cpp's own quantiser; runs in the environment that has llama-cpp-python.

    python benchmarks/peer_gguf.py MODEL.gguf OUT.gguf --to Q4_0

As llama.cpp does it unasked: with Q4_0 the head gets Q6_K, with Q8_0 everything but norms gets Q8_0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import llama_cpp as ll

TYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--to", choices=TYPES, required=True)
    ap.add_argument("--threads", type=int, default=os.cpu_count())
    a = ap.parse_args()
    began = time.perf_counter()
    options = ll.llama_model_quantize_default_params()
    options.ftype, options.nthread = TYPES[a.to], a.threads
    part = a.out.with_name(a.out.name + ".part")
    if ll.llama_model_quantize(str(a.model).encode(), str(part).encode(), options):
        part.unlink(missing_ok=True)
        raise SystemExit(f"llama.cpp could not quantise {a.model.name} to {a.to}")
    os.replace(part, a.out)
    print(json.dumps({"seconds": round(time.perf_counter() - began, 1), "nbytes": a.out.stat().st_size}))


if __name__ == "__main__":
    main()
