"""State and weights between passes: made, restored, committed, and brought in by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from offload.io.buffers import Lease
from offload.runtime.beside import WalkBeside
from offload.runtime.training_lanes import TrainingLanes
from offload.runtime.training_walk import LazyWeights, Rule, Walk
from offload.runtime.tuples import Tuples
from offload.tiers.cells import Cells, Shard
from offload.tiers.host import as_tensor
from offload.tiers.statefile import StateFile


class BetweenPasses:
    """No pass is under way, and lanes may have read ahead for the next.

    Args:
        cells, state: weights, and where the optimizer's state is stored.
        lanes, walk, tuples: what passes are walked with.
        rule: the optimizer.
    """

    def __init__(
        self, cells: Cells, state: StateFile, lanes: TrainingLanes, walk: Walk, tuples: Tuples, rule: Rule
    ) -> None:
        self._cells, self._state, self._lanes = cells, state, lanes
        self._walk, self._tuples, self._rule = walk, tuples, rule
        self._shards: dict[str, Shard] = {s.name: s for cell in cells.layouts.values() for s in cell.shards}

    def create(self, fill: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Makes the state of step 0 out of the first weights and commits it.

        Args:
            fill: puts first weights into tensors by name.
        """
        if self._cells.views:
            fill(dict(self._cells.views))
        for unit, cell in self._cells.layouts.items():
            if self._tuples.travels(unit):
                lease = self._slot()
                as_tensor(lease.view).zero_()  # padding
                self._walk.lend(unit, lease)
                fill({name: self._cells.views[name] for name in cell.places})
            for shard in cell.shards:
                self._lanes.writes.make_shard(shard.name, lambda view, shard=shard: self._first_state(shard, view))
            if self._tuples.travels(unit):
                self._walk.let_go(unit).release()
        self._state.commit(0, {})

    def restore(self) -> None:
        """Reads the committed state, checks all of it, and puts its weights into the cells that stay."""

        def see(name: str, view: memoryview) -> None:
            if self._cells.stays(self._shards[name].unit):
                self._rule.weights(self._walk.state_of(name, view), self._cells.shard(self._shards[name]))

        self._lanes.reads.look(see)
        self._walk.generation = self._state.step

    def commit(self, extra: Mapping[str, Any]) -> None:
        """Makes the present step, of which nothing is due, the one that a later run finds."""
        self._lanes.kept.write(self._walk.generation)
        self._state.commit(self._walk.generation, extra)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """By name, brought in as they are asked for; a tensor is good until the next one is."""
        return LazyWeights(self._cells, self._bring)

    def come_down(self) -> None:
        """What rests on the accelerator is in main memory too, and lanes hold nothing."""
        self._lanes.rest()
        if self._tuples.holds_there and isinstance(self._walk, WalkBeside):
            for unit, shards in self._tuples.resting.items():
                self._walk.come_down(unit, shards)
            self._tuples.holds_there = False

    def _bring(self, unit: str) -> None:
        """Puts the weights of a cell that travels into a slot, in place of the one before."""
        if isinstance(self._walk, WalkBeside):
            self.come_down()  # what lanes have brought ahead they would take back
        if self._cells.has(unit):
            return
        self._lanes.rest()
        self._walk.put_away()
        lease = self._slot()
        try:
            self._lanes.reads.weights(unit, lease.view).result()
        except BaseException:
            lease.release()
            raise
        self._walk.lend(unit, lease)

    def _slot(self) -> Lease:
        assert self._lanes.rings.cells is not None
        return self._lanes.rings.cells.lease()

    def _first_state(self, shard: Shard, view: memoryview) -> None:
        as_tensor(view)[self._rule.state_nbytes(shard.shape) :].zero_()
        self._rule.start(self._walk.state_of(shard.name, view), self._cells.shard(shard))
