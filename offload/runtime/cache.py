"""Keys and values with room to grow: a new token is written behind the others instead of copying all of them.

transformers' DynamicLayer concatenates, which reads and writes a layer's whole cache for every token. These layers
take its place in the same cache object. They hold views of a larger tensor in `keys` and `values`, so that everything
else that transformers does with them (crop, select, repeat, beams) works as before:

    room    | token 0 | token 1 | ... | token n-1 |  not written yet  |
    keys    <------------------------------------->

What hands `keys` something else than a view of the room is noticed at the next token, which makes new room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MORE = 256  # tokens of room beyond what is needed at once, where nobody said how many there will be


class Room:
    """Memory for one layer's keys and values, of which a run of tokens is in use.

    Args:
        like: keys or values [batch, heads, tokens, head_dim].
        tokens: how many shall fit.
    """

    def __init__(self, like: torch.Tensor, tokens: int) -> None:
        batch, heads, _, dim = like.shape
        self.whole = torch.empty(batch, heads, tokens, dim, dtype=like.dtype, device=like.device)

    def place_of(self, view: torch.Tensor | None) -> int | None:
        """Where `view` begins, in tokens; None when it is no run of tokens of this room."""
        whole = self.whole
        if view is None or view.stride() != whole.stride() or view.dtype != whole.dtype:
            return None
        if view.shape[:2] != whole.shape[:2] or view.shape[3] != whole.shape[3]:
            return None
        at, rest = divmod(view.data_ptr() - whole.data_ptr(), whole.stride(2) * whole.itemsize)
        return at if rest == 0 and 0 <= at <= whole.shape[2] - view.shape[2] else None


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of all tokens so far.

    Attributes:
        planned: tokens that are expected in all.
    """

    planned = 0
    _rooms: tuple[Room, Room] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = 0 if self.keys.numel() == 0 else self.keys.shape[-2]
        after = before + key_states.shape[-2]
        rooms = self._rooms
        if before == 0 or rooms is None or after > rooms[0].whole.shape[2] or not self._is_there(rooms):
            tokens = self.planned if self.planned >= after else after + max(MORE, after // 8)
            rooms = Room(key_states, tokens), Room(value_states, tokens)
            if before:
                rooms[0].whole[:, :, :before] = self.keys
                rooms[1].whole[:, :, :before] = self.values
            self._rooms = rooms
        rooms[0].whole[:, :, before:after] = key_states
        rooms[1].whole[:, :, before:after] = value_states
        self.keys, self.values = rooms[0].whole[:, :, :after], rooms[1].whole[:, :, :after]
        return self.keys, self.values

    def _is_there(self, rooms: tuple[Room, Room]) -> bool:
        return rooms[0].place_of(self.keys) == 0 and rooms[1].place_of(self.values) == 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._rooms is None or self.get_seq_length() == 0 or len(beam_idx) != self.keys.shape[0]:
            super().reorder_cache(beam_idx)
            return
        for tensor in (self.keys, self.values):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def reset(self) -> None:
        self._rooms = None
        super().reset()


class RoomySlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer of the last tokens only: they move on through the room, and back to its start when its end is reached."""

    _rooms: tuple[Room, Room] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept, new = self.sliding_window - 1, key_states.shape[-2]
        if self.record_past or kept == 0 or new > kept + MORE or not self.is_initialized:
            self._rooms = None
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.cumulative_length += new
        before = self.keys.shape[-2] if self.keys.numel() else 0
        rooms, at = self._rooms, None
        if rooms is not None and before:
            places = rooms[0].place_of(self.keys), rooms[1].place_of(self.values)
            at = places[0] if places[0] == places[1] else None
        if rooms is None or at is None or at + before + new > rooms[0].whole.shape[2]:
            rooms, at = (Room(key_states, kept + new + MORE), Room(value_states, kept + new + MORE)), 0
            if before:
                rooms[0].whole[:, :, :before] = self.keys
                rooms[1].whole[:, :, :before] = self.values
            self._rooms = rooms
        end = at + before + new
        rooms[0].whole[:, :, end - new : end] = key_states
        rooms[1].whole[:, :, end - new : end] = value_states
        start = max(at, end - kept)
        self.keys, self.values = rooms[0].whole[:, :, start:end], rooms[1].whole[:, :, start:end]
        return rooms[0].whole[:, :, at:end], rooms[1].whole[:, :, at:end]

    def reset(self) -> None:
        self._rooms = None
        super().reset()


_ROOMY: dict[type, type] = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}


def make_roomy(cache: Any, planned: int) -> None:
    """Turns a cache's plain layers into roomy ones, in place; others stay as they are.

    Args:
        cache: a transformers Cache; anything else is left alone.
        planned: tokens of a sequence that memory was set aside for; 0 when unknown.
    """
    for layer in getattr(cache, "layers", ()):
        roomy = _ROOMY.get(type(layer))
        if roomy is not None:
            layer.__class__ = roomy
            layer.planned = planned


def adopter(planned: int) -> Callable[..., None]:
    """A pre-forward hook that makes the cache roomy which a model is called with."""

    def adopt(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        make_roomy(kwargs.get("past_key_values"), planned)

    return adopt
