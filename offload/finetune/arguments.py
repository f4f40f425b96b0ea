"""What `offload.finetuning` may be told, by the rules of the configuration: a value is right in both or in neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import fields

from offload.finetune.config import Budgets, Config, Data, Lora, Positive, Section, Share, Train, Zo
from offload.finetune.reading import check_key, check_value


def _kind(section: type[Section], key: str) -> Any:
    return next(f.type for f in fields(section) if f.name == key)


KINDS: dict[str, Any] = {
    "method": _kind(Config, "method"),
    "zo_eps": _kind(Zo, "eps"),
    "zo_write_every": _kind(Zo, "write_every"),
    "zo_sparsity": _kind(Zo, "sparsity"),
    "optimizer": _kind(Train, "optim"),
    "learning_rate": _kind(Train, "learning_rate"),
    "max_grad_norm": Positive | None,  # the configuration's 0 is None here
    "weight_decay": _kind(Train, "weight_decay"),
    "betas": tuple[Share, Share] | None,
    "eps": _kind(Train, "adam_epsilon") | None,
    "update_share": _kind(Budgets, "update_share"),
    "seed": _kind(Train, "seed"),
    "tokens": _kind(Data, "max_length"),
    "micro_batches": _kind(Train, "gradient_accumulation_steps"),
    "activations": _kind(Budgets, "activations"),
}
"""Argument -> what it may be."""


def check_arguments(lora: Mapping[str, Any] | None, **given: Any) -> None:
    """Refuses what the configuration would refuse.

    Args:
        lora: of the adapters.
        given: names of KINDS.

    Raises:
        UsageError: says which argument, and what it may be.
    """
    for name, value in given.items():
        check_value(name, value, KINDS[name])
    for key, value in (lora or {}).items():
        check_key(f"lora.{key}", "finetuning")
        check_value(f"lora.{key}", value, _kind(Lora, key))
