"""What has been measured so far: the parts of a profile, as they are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from offload.profile import Lane, OpTable, Processor


@dataclass
class Figures:
    """What has been measured so far.

    Attributes:
        keys: name -> rate, of the figures that are repeated at the end.
        again: how to measure them.
    """

    processors: dict[str, Processor] = field(default_factory=dict)
    lanes: dict[str, Lane] = field(default_factory=dict)
    ops: list[OpTable] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keys: dict[str, float] = field(default_factory=dict)
    again: dict[str, Callable[[], float]] = field(default_factory=dict)

    def key(self, name: str, measure: Callable[[], float], first: float) -> None:
        """A figure that is repeated at the end."""
        self.keys[name], self.again[name] = first, measure
