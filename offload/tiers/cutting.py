"""Cuts stored matrices between two rows, so that each part is a tensor of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from offload.io.extents import Extent
from offload.planner.placement import Placement
from offload.planner.processors import host_part
from offload.tiers.layout import Piece, Source


def cut_sources(
    sources: Mapping[str, Source], units: Mapping[str, Sequence[str]], placement: Placement
) -> tuple[dict[str, Source], dict[str, list[str]]]:
    """Sources and the tensors of each unit, with the rows that the CPU has as tensors of their own.

    A matrix of which the CPU has every row is gone; only its part is left.
    """
    found = dict(sources)
    for name, first in placement.first_rows.items():
        whole = found.pop(name)
        rest = host_part(name, first)
        found[rest] = replace(rows_of_source(whole, first, whole.shape[0]), name=rest)
        if first:
            found[name] = rows_of_source(whole, 0, first)
    names = {}
    for unit, tensors in units.items():
        parts = [t.name for t in placement.host_parts.get(unit, ())]
        names[unit] = [n for n in tensors if n in found] + parts
    return found, names


def rows_of_source(source: Source, first: int, last: int) -> Source:
    """Rows `first` to `last` of a matrix; all of them where it is stored packed."""
    if (first, last) == (0, source.shape[0]):
        return source
    assert not source.is_stored_packed, "the rows of a packed matrix do not lie apart"
    width = prod(source.shape[1:])
    form = source.form and source.form.with_outputs(last - first)
    shape = (last - first, *source.shape[1:])
    return replace(source, shape=shape, pieces=tuple(_within(source, first * width, last * width)), form=form)


def _within(source: Source, first: int, last: int) -> Iterator[Piece]:
    """The parts of pieces that hold elements `first` to `last`, counted from the first."""
    for piece in source.pieces:
        begin, end = max(first, piece.start), min(last, piece.start + piece.count)
        if begin < end:
            size = piece.dtype.itemsize
            at = piece.extent.offset + (begin - piece.start) * size
            yield Piece(Extent(piece.extent.path, at, (end - begin) * size), piece.dtype, begin - first, end - begin)


def cut_given(given: Mapping[str, torch.Tensor], placement: Placement) -> dict[str, torch.Tensor]:
    """Tensors that are in main memory already, cut likewise. Shares their memory."""
    found = dict(given)
    for name, first in placement.first_rows.items():
        if name in found:
            whole = found.pop(name)
            found[host_part(name, first)] = whole[first:]
            if first:
                found[name] = whole[:first]
    return found
