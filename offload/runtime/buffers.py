"""A model's buffers where the model computes, and back again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def move_buffers(root: nn.Module, device: torch.device) -> Callable[[], None]:
    """Copies buffers to a device of another kind than they are on; returns what puts the old ones back."""
    moved: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in root.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device.type:
                moved.append((module, name, buffer))
                module._buffers[name] = buffer.to(device)

    def put_back() -> None:
        for module, name, buffer in moved:
            module._buffers[name] = buffer
        moved.clear()

    return put_back
