"""Finds the units of a module: the parts that are entered and left as a whole, from the module tree alone.

Models repeat a block in a list. A list (ModuleList, Sequential, ModuleDict) that holds most of a module's bytes is
taken apart into its items; around it, each child with parameters is a unit of its own (embeddings, norms, heads). No
name and no architecture is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class Owner:
    """One place that holds a tensor: a module and the attribute's name there."""

    module: nn.Module
    attribute: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A module that runs as a whole.

    Attributes:
        name: its dotted name.
        module: the module whose forward is the unit's.
        tensors: names of the parameters that belong to it.
    """

    name: str
    module: nn.Module
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A module's parameters, divided.

    Attributes:
        units: in the order of the module tree.
        loose: parameters outside every unit, or shared by several; they must stay where the model computes.
        tables: parameters of units that only embeddings use.
        linears: weights of units that only nn.Linear modules use.
        transposed: those that only Conv1D modules of transformers use: products by a matrix [inputs, outputs].
        owners: parameter name -> every place that holds it; the first gives the name.
    """

    units: tuple[Unit, ...]
    loose: tuple[str, ...]
    tables: frozenset[str]
    linears: frozenset[str]
    transposed: frozenset[str]
    owners: dict[str, tuple[Owner, ...]]


def dissect(root: nn.Module, keep: Callable[[nn.Parameter], bool] = lambda _: False, *, shares: bool = True) -> Anatomy:
    """Divides a module's parameters among units. Touches no data, so the module may be on meta.

    Args:
        keep: whether a parameter must stay where it is, whatever unit uses it.
        shares: a table that one unit uses whole and another by rows belongs to the first. For training it is loose, as
            both give it a gradient, and a unit without a parameter of its own counts too.
    """
    names: dict[int, str] = {}
    owners: dict[str, list[Owner]] = {}
    owning_module: dict[str, list[str]] = {}
    kept: set[str] = set()
    for module_name, module in root.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{module_name}.{attribute}" if module_name else attribute
            name = names.setdefault(id(parameter), full)
            owners.setdefault(name, []).append(Owner(module, attribute))
            if keep(parameter):
                kept.add(name)
            owning_module.setdefault(name, []).append(module_name)
    parts = list(_parts(root, "", _nbytes(root)))
    units: list[Unit] = []
    loose: set[str] = set()
    for unit_name, module in parts:
        prefix = f"{unit_name}." if unit_name else ""
        mine = []
        for name, holders in owners.items():
            whole_users = [
                m
                for m, o in zip(owning_module[name], holders, strict=True)
                if not (shares and isinstance(o.module, nn.Embedding))
            ] or owning_module[name]
            inside = [m for m in whole_users if m == unit_name or m.startswith(prefix)]
            if inside and len(inside) == len(whole_users) and name not in kept:
                mine.append(name)
        units.append(Unit(name=unit_name, module=module, tensors=tuple(mine)))
    taken = {t for u in units for t in u.tensors}
    loose = {name for name in owners if name not in taken}
    tables = {
        name
        for name, holders in owners.items()
        if all(isinstance(o.module, nn.Embedding) and o.attribute == "weight" and _is_plain_table(o) for o in holders)
    }
    linears = {
        name
        for name, holders in owners.items()
        if all(type(o.module) is nn.Linear and o.attribute == "weight" for o in holders)
    }
    transposed = {
        name
        for name, holders in owners.items()
        if all(is_conv1d(o.module) and o.attribute == "weight" for o in holders)
    }
    return Anatomy(
        units=tuple(u for u in units if u.tensors or not shares),
        loose=tuple(sorted(loose)),
        tables=frozenset(tables - loose),
        linears=frozenset(linears - loose),
        transposed=frozenset(transposed - loose),
        owners={name: tuple(holders) for name, holders in owners.items()},
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer that transformers has from GPT; it is told by name, so that none is imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_plain_table(owner: Owner) -> bool:
    """Whether looking rows up changes nothing in the table."""
    assert isinstance(owner.module, nn.Embedding)
    return owner.module.max_norm is None and not owner.module.sparse


def _nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _parts(module: nn.Module, name: str, total: int) -> Iterator[tuple[str, nn.Module]]:
    """The units below a module, in tree order."""
    children = [(k, c) for k, c in module.named_children() if any(True for _ in c.parameters())]
    splits = isinstance(module, _LISTS) or any(_holds_list(c) for _, c in children) or name == ""
    if not children or not splits:
        yield name, module
        return
    for key, child in children:
        full = f"{name}.{key}" if name else key
        small = isinstance(module, _LISTS) and _nbytes(child) * 4 <= total
        if _holds_list(child) and not small:
            yield from _parts(child, full, total)
        else:
            yield full, child


def _holds_list(module: nn.Module) -> bool:
    """Whether most of a module's bytes lie in lists of at least two items with parameters."""
    held = 0
    counted: set[int] = set()  # modules below lists that were counted
    for child in module.modules():
        if id(child) in counted:
            continue
        items = [c for c in child.children() if any(True for _ in c.parameters())]
        if isinstance(child, _LISTS) and len(items) >= 2:
            held += _nbytes(child)
            counted.update(map(id, child.modules()))
    return held * 2 > _nbytes(module)
