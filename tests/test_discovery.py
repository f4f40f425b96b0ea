"""A module tree is divided into units: by what lies where, in one walk, however deep and wide it is."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from offload.runtime.discovery import dissect


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width)


class Body(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.table, self.layers, self.norm = (
            nn.Embedding(4, 8),
            nn.ModuleList(map(Block, [8] * blocks)),
            nn.LayerNorm(8),
        )


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.body, self.head = Body(blocks), nn.Linear(8, 4, bias=False)


def test_blocks_and_what_stands_around_them() -> None:
    found = dissect(Model())
    assert [unit.name for unit in found.units] == [
        "body.table", "body.layers.0", "body.layers.1", "body.layers.2", "body.norm", "head",
    ]  # fmt: skip
    assert found.units[1].tensors == ("body.layers.0.up.weight", "body.layers.0.norm.weight", "body.layers.0.norm.bias")
    assert found.tables == {"body.table.weight"}
    assert found.linears == {"head.weight", *(f"body.layers.{k}.up.weight" for k in range(3))}
    assert found.loose == ()


@pytest.mark.parametrize("shares", [True, False])
def test_a_tied_table_belongs_to_who_uses_it_whole(shares: bool) -> None:
    model = Model()
    model.head.weight = model.body.table.weight
    found = dissect(model, shares=shares)
    head = next((unit for unit in found.units if unit.name == "head"), None)
    assert head is not None
    assert head.tensors == (("body.table.weight",) if shares else ())
    assert found.loose == (() if shares else ("body.table.weight",))
    assert not found.tables
    assert [place.attribute for place in found.owners["body.table.weight"]] == ["weight", "weight"]


def test_what_two_units_use_and_what_must_stay_is_loose() -> None:
    model = Model()
    model.body.layers[0].up.weight = model.body.layers[2].up.weight
    kept = model.head.weight
    found = dissect(model, keep=lambda parameter: parameter is kept)
    assert found.loose == ("body.layers.0.up.weight", "head.weight")
    assert "head" not in [unit.name for unit in found.units]  # nothing is left of it


def test_a_module_without_children_is_one_unit() -> None:
    assert [unit.name for unit in dissect(nn.Linear(2, 2)).units] == [""]


def test_every_module_is_looked_at_as_often_however_deep_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def nested(depth: int) -> nn.Module:
        return nn.ModuleList([nested(depth - 1), nested(depth - 1)]) if depth else nn.Linear(1, 1, bias=False)

    looks: Counter[int] = Counter()
    children = nn.Module.named_children

    def counted(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        looks[id(module)] += 1
        return children(module)

    with torch.device("meta"):
        model = nested(7)
    monkeypatch.setattr(nn.Module, "named_children", counted)
    assert dissect(model).units
    assert max(looks.values()) <= 2
