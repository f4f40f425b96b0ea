"""A checksum of bytes at the speed of memory, for what is read back from a disk."""

from __future__ import annotations

import hashlib

import torch

PIECE_NBYTES = 256 << 10
LINE_NBYTES = 64


def checksum(data: torch.Tensor) -> str:
    """Finds every change within four bytes, and others but for one in 2**32: corruption, not forgery.

    Each piece of 256 KiB is lines of 16 numbers; of each column it keeps the sum and the sum of the sums so far, modulo
    2**32 (Fletcher, 1982, without his modulus). What is kept is hashed, with its order and length.

    Args:
        data: uint8 [n], contiguous, n a multiple of 64.

    Returns:
        32 hexadecimal digits.
    """
    sums = []
    for piece in data.split(PIECE_NBYTES) if data.numel() else ():
        lines = piece.view(torch.int32).view(-1, 16)
        weights = torch.arange(len(lines), 0, -1, dtype=torch.int32)[:, None]
        sums += [lines.sum(0, dtype=torch.int32), (lines * weights).sum(0, dtype=torch.int32)]
    return digest(torch.cat(sums) if sums else torch.empty(0, dtype=torch.int32), data.numel())


def digest(sums: torch.Tensor, nbytes: int) -> str:
    """What a checksum is made of: the sums of all pieces, int32, and the length."""
    hashed = hashlib.blake2b(sums.numpy().tobytes(), digest_size=16)
    hashed.update(nbytes.to_bytes(8, "little"))
    return hashed.hexdigest()
