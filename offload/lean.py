"""Keeps a command's process small: packages that others import on sight, and that no command uses, are left out.

transformers imports scipy for losses of object detection, and torch's compiler, which nothing here calls, imports
triton. Both do without where a package is missing, and `None` in `sys.modules` is Python's way to say that it is. That
holds for the whole process, so it is for processes of our own: a program that imports offload is left as it is.
"""

from __future__ import annotations

import sys

from offload.hardware import gpus


def leave_out() -> None:
    """Call it before torch is imported: later there is nothing to gain."""
    if "torch" in sys.modules:
        return
    unused = ["scipy"] if gpus() else ["scipy", "triton"]
    for name in unused:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
