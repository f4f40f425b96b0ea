"""One source for each parameter of a model: a tied one may be stored under any of its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from offload.errors import CheckpointError
from offload.runtime.discovery import Anatomy
from offload.tiers.layout import Source


def by_parameter(
    model: nn.Module, anatomy: Anatomy, located: Mapping[str, Source], is_same: Callable[[Source, Source], bool]
) -> dict[str, Source]:
    """The source of every parameter.

    Args:
        is_same: whether two sources hold the same values; asked where tied parameters are stored apart.

    Raises:
        CheckpointError: a parameter is not stored, or tied ones differ.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    sources, missing = {}, []
    for name, owners in anatomy.owners.items():
        names = {".".join(filter(None, (path, o.attribute))): None for o in owners for path in paths[id(o.module)]}
        found = [located[n] for n in names if n in located]
        if not found:
            missing.append(name)
            continue
        for other in found[1:]:
            if other.pieces != found[0].pieces and not is_same(found[0], other):
                raise CheckpointError(
                    f"config.json ties {found[0].name} and {other.name}, but the checkpoint holds different values for "
                    'them; set "tie_word_embeddings": false in config.json if they are meant to differ'
                )
        sources[name] = replace(found[0], name=name)
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors that the model needs: {shown}")
    return sources
