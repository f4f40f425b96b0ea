"""DeepSpeedCPUAdam on demand: a JSON line when it is ready, then a step for every line it reads, and its seconds.

    python benchmarks/kernels.py --only adamw --deepspeed-python VENV/bin/python     # starts it and asks in turn

For an environment with torch and DeepSpeed, which compiles its kernel at first use (g++, ninja). Master weights,
gradients and moments are float32 in huge pages, as beside it. It writes no 16-bit weights: after the line "weight", a
copy of the master to bf16 is part of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import sys
import time
from typing import Any

HUGE_NBYTES = 2 << 20


def huge(tensor: Any) -> Any:
    """A copy in huge pages."""
    import torch

    memory = mmap.mmap(-1, tensor.nbytes + HUGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_NBYTES
    place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=skip)
    return place.copy_(tensor)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--count", type=int, default=32 << 20, help="parameters")
    a = ap.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints as it goes
        import deepspeed
        import torch
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = torch.nn.Parameter(huge(torch.randn(a.count)))
        parameter.grad = huge(torch.randn(a.count))
        optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3, adamw_mode=True)
        optimizer.step()
        state = optimizer.state[parameter]
        state |= {k: huge(v) for k, v in state.items() if torch.is_tensor(v) and v.numel() == a.count}
        optimizer.step()
        weight = huge(parameter.detach().bfloat16())
    print(json.dumps({"version": deepspeed.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            optimizer.step()
        if line.strip() == "weight":
            weight.copy_(parameter.detach())
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
