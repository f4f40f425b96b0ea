"""Everything that computes part of a model faster than the model's own ops, put in place together."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from offload.kernels.chosen import Kernels
from offload.runtime import attention, conv1d, experts, gates, linears, norms, rotaries
from offload.runtime.lookups import Vanished


def install(
    root: nn.Module, kernels: Kernels, *, has_faces: bool, planned_tokens: int, lacks: list[str]
) -> Callable[[], None]:
    """Lets kernels compute for `root`; returns what leaves the model as it was.

    Args:
        kernels: what computes; with exact ones only products change, and keep their bits.
        has_faces: whether any weight is packed or lies apart.
        planned_tokens: of a sequence, for its keys and values; 0 when unknown.
        lacks: gets a sentence for each part that cannot be put in place with this transformers.
    """
    removers = [linears.install(root, kernels, has_faces=has_faces)]
    if not kernels.exact and kernels.device == "cpu":
        parts = norms, rotaries, attention, experts, conv1d, gates
        for part in parts:
            try:
                removers.append(part.install(root, kernels))
            except Vanished as error:
                lacks.append(str(error))
        if "transformers" in sys.modules:
            from offload.runtime.cache import adopter

            hook = root.register_forward_pre_hook(adopter(planned_tokens), with_kwargs=True, prepend=True)
            removers.append(hook.remove)

    def remove() -> None:
        for undo in reversed(removers):
            undo()

    return remove
