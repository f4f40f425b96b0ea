"""Keys and values of many sequences in one region: each has a run of tokens there for as long as it runs.

    one layer, one head    | sequence 4 . . | sequence 9 . . . . |   free   | sequence 7 . . | scrap |

A run is as long as its sequence can become, and lies at the same place in every layer. Runs are taken where they fit
first and given back in any order; neighbours that are free become one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload.io.buffers import Buffer
from offload.tiers.device import Device
from offload.tiers.host import as_tensor


class Runs:
    """Who has which tokens of `tokens`: whole numbers only.

    Attributes:
        free: tokens that nobody has.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = self.free = tokens
        self._gaps: list[tuple[int, int]] = [(0, tokens)] if tokens else []  # (start, end), in order
        self._taken: dict[int, int] = {}

    def take(self, tokens: int) -> int | None:
        """Where a run of `tokens` begins; None where no gap is as long."""
        for at, (start, end) in enumerate(self._gaps):
            if end - start >= tokens:
                self._gaps[at : at + 1] = [(start + tokens, end)] if end - start > tokens else []
                self._taken[start] = tokens
                self.free -= tokens
                return start
        return None

    def give(self, start: int) -> None:
        """The run that begins there is free again."""
        tokens = self._taken.pop(start)
        self.free += tokens
        gaps = sorted([*self._gaps, (start, start + tokens)])
        self._gaps = [gaps[0]]
        for begin, end in gaps[1:]:
            if begin == self._gaps[-1][1]:
                self._gaps[-1] = self._gaps[-1][0], end
            else:
                self._gaps.append((begin, end))

    def check_integrity(self) -> None:
        """Free and taken runs cover all tokens once."""
        spans = sorted([*self._gaps, *((s, s + n) for s, n in self._taken.items())])
        assert [s for s, _ in spans] == [0, *(e for _, e in spans[:-1])][: len(spans)], spans
        assert (spans[-1][1] if spans else 0) == self.tokens, spans
        assert self.free == sum(e - s for s, e in self._gaps), (self.free, self._gaps)


class KeyValuePool:
    """Memory for keys and values of all layers: the device's own, or main memory in huge pages.

    Args:
        layers, kv_heads, head_dim: of the model.
        tokens: of all sequences together.
        dtype: of keys and values.
        device: where the model computes, which keeps this memory until it is closed; None: the CPU.

    Attributes:
        runs: who has which tokens.
        scrap: a token that nobody has, for rows of a pass that belong to no sequence.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        dtype: torch.dtype,
        device: Device | None = None,
    ) -> None:
        self._shape = (2, kv_heads, tokens + 1, head_dim)
        self._dtype, self._device = dtype, device if device is not None and device.has_memory else None
        self.runs, self.scrap = Runs(tokens), tokens
        self._buffers: list[Buffer] = []
        nbytes = torch.Size(self._shape).numel() * dtype.itemsize
        if self._device is not None:
            memory = self._device.allocate(layers * nbytes)
            self._layers = [memory[k * nbytes : (k + 1) * nbytes].view(dtype).view(self._shape) for k in range(layers)]
        else:
            self._layers = [self._allocate(self._shape) for _ in range(layers)]

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """A layer in main memory; one at a time can be given back."""
        self._buffers.append(Buffer(torch.Size(shape).numel() * self._dtype.itemsize))
        return as_tensor(self._buffers[-1].view).view(self._dtype).view(shape)

    @property
    def can_shrink(self) -> bool:
        """Whether what it gives back is free for others."""
        return self._device is None

    def shrink(self, runs: Sequence[tuple[int, int]]) -> list[int]:
        """Keeps these runs, (start, tokens) of each, side by side in as much memory as they take; gives back the rest.

        They move to the front of the memory they are in, one head of one layer at a time.

        Returns:
            Where each begins from now on.
        """
        assert self.can_shrink
        tokens = sum(length for _, length in runs)
        self._shape = (*self._shape[:2], tokens + 1, self._shape[3])
        self.runs, self.scrap = Runs(tokens), tokens
        starts = []
        for _, length in runs:
            start = self.runs.take(length)
            assert start is not None, "they take exactly this much"
            starts.append(start)
        for number, buffer in enumerate(self._buffers):
            old, numbers = self._layers[number], as_tensor(buffer.view).view(self._dtype)
            new = self._layers[number] = numbers[: torch.Size(self._shape).numel()].view(self._shape)
            # a head's new place ends before the next one's old place begins: nothing is overwritten that has not moved
            for source, target in zip(old.flatten(0, 1), new.flatten(0, 1), strict=True):
                target[:tokens] = torch.cat([source[at : at + length] for at, length in runs])
            buffer.discard(new.numel() * new.itemsize, buffer.nbytes)
        return starts

    @property
    def torch_device(self) -> torch.device:
        """Where it lies."""
        return self._layers[0].device

    @property
    def layers(self) -> int:
        return len(self._layers)

    def keys(self, layer: int) -> torch.Tensor:
        """[kv_heads, tokens + 1, head_dim]"""
        return self._layers[layer][0]

    def values(self, layer: int) -> torch.Tensor:
        """[kv_heads, tokens + 1, head_dim]"""
        return self._layers[layer][1]

    def refuses(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> str | None:
        """Why keys and values [1, kv_heads, tokens, head_dim] of a layer have no place here; None when they have."""
        heads, _, dim = self.keys(layer).shape if 0 <= layer < self.layers else (0, 0, 0)
        for tensor in (key, value):
            if tensor.shape[0] != 1 or tensor.shape[1] != heads or tensor.shape[3] != dim:
                return f"layer {layer} has keys or values of {tuple(tensor.shape)}, where {heads} x {dim} was planned"
            if tensor.dtype != self._dtype:
                return f"layer {layer} has keys or values in {tensor.dtype}, where {self._dtype} was planned"
        return None

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor) -> None:
        """Puts tokens of one pass, [1, kv_heads, tokens, head_dim], at their places, int64 [tokens]."""
        self.keys(layer).index_copy_(1, places, key[0])
        self.values(layer).index_copy_(1, places, value[0])

    def close(self) -> None:
        """Gives the memory back; nothing of the pool may be used any more."""
        self._layers = []
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []


def need_of(prompt_tokens: Sequence[int], new_tokens: int) -> list[int]:
    """Tokens of the run that each sequence needs: the last new token is never fed back."""
    return [tokens + new_tokens - 1 for tokens in prompt_tokens]
