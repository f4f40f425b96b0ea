"""Reading safetensors: the names to import. Headers are in header.py, directories of files in checkpoint.py."""

from __future__ import annotations

from offload.io.checkpoint import Checkpoint, read_checkpoint
from offload.io.entries import ITEMSIZE_BITS, Entry, Header, Limits
from offload.io.header import read_header

__all__ = ["ITEMSIZE_BITS", "Checkpoint", "Entry", "Header", "Limits", "read_checkpoint", "read_header"]
