"""Finds the units of a module: the parts that are entered and left as a whole, from the module tree alone.

Models repeat a block in a list. A list (ModuleList, Sequential, ModuleDict) that holds most of a module's bytes is
taken apart into its items; around it, each child with parameters is a unit of its own (embeddings, norms, heads). No
name and no architecture is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    holders: dict[str, list[str]] = {}  # parameter -> the modules of its owners
    kept: set[str] = set()
    for module_name, module in root.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{module_name}.{attribute}" if module_name else attribute
            name = names.setdefault(id(parameter), full)
            owners.setdefault(name, []).append(Owner(module, attribute))
            holders.setdefault(name, []).append(module_name)
            if keep(parameter):
                kept.add(name)
    parts = dict(_parts(root))
    tensors: dict[str, list[str]] = {unit: [] for unit in parts}
    loose: set[str] = set()
    for name, places in owners.items():
        by_rows = [shares and isinstance(place.module, nn.Embedding) for place in places]
        users = {
            _unit_of(holder, parts) for holder, is_by_rows in zip(holders[name], by_rows, strict=True) if not is_by_rows
        } or {_unit_of(holder, parts) for holder in holders[name]}
        unit = users.pop() if len(users) == 1 else None
        if unit is None or name in kept:
            loose.add(name)
        else:
            tensors[unit].append(name)
    units = [Unit(name=name, module=module, tensors=tuple(tensors[name])) for name, module in parts.items()]

    def only(belongs: Callable[[nn.Module], bool]) -> frozenset[str]:
        """Weights of units that only such modules hold."""
        return frozenset(
            name
            for name, places in owners.items()
            if name not in loose and all(place.attribute == "weight" and belongs(place.module) for place in places)
        )

    return Anatomy(
        units=tuple(u for u in units if u.tensors or not shares),
        loose=tuple(sorted(loose)),
        tables=only(_is_plain_table),
        linears=only(lambda module: type(module) is nn.Linear),
        transposed=only(is_conv1d),
        owners={name: tuple(places) for name, places in owners.items()},
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer that transformers has from GPT; it is told by name, so that none is imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_plain_table(module: nn.Module) -> bool:
    """Whether it is an embedding that changes nothing in its table when it looks rows up."""
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse


def _unit_of(module: str, units: Mapping[str, object]) -> str | None:
    """The unit that a module lies in, from their dotted names: units do not lie in one another."""
    while module and module not in units:
        module = module.rpartition(".")[0]
    return module if module in units else None


@dataclass(frozen=True, slots=True)
class _Weight:
    """What lies below a module.

    Attributes:
        parameters: id -> bytes.
        nbytes: of them all.
        in_lists: those of them in lists of at least two items with parameters.
    """

    parameters: dict[int, int]
    nbytes: int
    in_lists: int

    @property
    def is_listed(self) -> bool:
        """Whether most of it lies in lists."""
        return self.in_lists * 2 > self.nbytes


def _weigh(module: nn.Module, weights: dict[int, _Weight]) -> _Weight:
    """Weighs a module and everything below it, once each: id of a module -> its weight."""
    if id(module) in weights:
        return weights[id(module)]
    below = [_weigh(child, weights) for child in module.children()]
    parameters = {id(p): p.numel() * p.element_size() for p in module.parameters(recurse=False)}
    for weight in below:
        parameters |= weight.parameters
    nbytes = sum(parameters.values())
    is_list = isinstance(module, _LISTS) and sum(bool(weight.parameters) for weight in below) >= 2
    weights[id(module)] = _Weight(parameters, nbytes, nbytes if is_list else sum(w.in_lists for w in below))
    return weights[id(module)]


def _parts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The units of a module, in tree order."""
    weights: dict[int, _Weight] = {}
    total = _weigh(root, weights).nbytes

    def split(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        children = [(key, child) for key, child in module.named_children() if weights[id(child)].parameters]
        is_list = isinstance(module, _LISTS)
        if not children or not (name == "" or is_list or any(weights[id(c)].is_listed for _, c in children)):
            yield name, module
            return
        for key, child in children:
            full = f"{name}.{key}" if name else key
            is_small = is_list and weights[id(child)].nbytes * 4 <= total
            if weights[id(child)].is_listed and not is_small:
                yield from split(child, full)
            else:
                yield full, child

    return split(root, "")
