"""What all Triton kernels ask before they are launched: is every tensor where a kernel can reach it?"""

from __future__ import annotations

import torch
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)  # read when kernels are defined, as Triton does


def misplaced(*tensors: torch.Tensor | None) -> str | None:
    """Why no kernel can take these; None when one can. Under Triton's interpreter they may lie in main memory."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    for device in devices:
        if device.type != "cuda" and not INTERPRETED:
            return f"on {device}, not on a CUDA device"
    if len(devices) > 1:
        return f"on several devices: {', '.join(sorted(map(str, devices)))}"
    return None


def on(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which kernels are launched on the tensor's device; Triton takes the current one otherwise."""
    return torch.cuda.device_of(tensor)
