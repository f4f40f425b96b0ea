"""A transformers model without its weights: parameters on meta, buffers real, exactly as its constructor makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.checkpoint.finding import MANIFEST, check_config
from offload.errors import CheckpointError, UsageError


def read_config(directory: Path) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        CheckpointError: there is none, it is broken, of an unknown kind, or quantised.
    """
    from transformers import AutoConfig

    check_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:  # TypeError: a file that is no table
        raise CheckpointError(
            f"{directory}/config.json cannot be used: {error}. Models with code of their own "
            "(trust_remote_code) are not run; build the module yourself and use offload.wrap"
        ) from error
    if getattr(config, "quantization_config", None):
        if (directory / MANIFEST).is_file():  # packed by offload pack
            del config.quantization_config
            return config
        kind = dict(config.quantization_config).get("quant_method", "some quantisation")
        raise CheckpointError(
            f"{directory} is quantised ({kind}), which cannot be streamed yet; use the model's 16-bit checkpoint"
        )
    return config


def resolve_dtype(dtype: str | torch.dtype, config: Any, stored: str | None) -> torch.dtype:
    """What transformers' dtype= means: a torch dtype, its name, or "auto": the configuration's, else as stored."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
        if named is None:
            named = {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored or "", torch.float32)
        return named if isinstance(named, torch.dtype) else resolve_dtype(str(named), config, stored)
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f'dtype={dtype!r} is not known; use "auto", "bfloat16", "float16" or "float32"')
    return found


def build(config: Any, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """The model in evaluation mode. Takes milliseconds and no memory for parameters, whatever its size.

    Args:
        config: a transformers configuration.
        dtype: of its parameters.
        kwargs: handed to `from_config`, such as attn_implementation.

    Raises:
        CheckpointError: transformers has no class for it.
        UsageError: it does not know one of kwargs.
    """
    import transformers

    causal = transformers.AutoModelForCausalLM
    with _known(kwargs), _parameters_on_meta():
        if type(config) in causal._model_mapping:
            model = causal.from_config(config, dtype=dtype, **kwargs)
        else:
            names = list(config.architectures or ())
            cls = next((c for n in names if (c := getattr(transformers, n, None)) is not None), None)
            if cls is None:
                raise CheckpointError(
                    f"transformers {transformers.__version__} has no class for {names or config.model_type}; "
                    "build the module yourself and use offload.wrap"
                )
            model = cls._from_config(config, dtype=dtype, **kwargs)
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def _known(kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A misspelt option of ours ends up with transformers: says so in place of its TypeError."""
    try:
        yield
    except TypeError as error:
        unknown = [name for name in kwargs if f"unexpected keyword argument '{name}'" in str(error)]
        if not unknown:
            raise
        raise UsageError(f"{unknown[0]} is an option neither of offload nor of the model in transformers") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that is registered moves to meta at once; buffers are left as they are made.

    The real tensor lives for an instant and is hardly ever touched, so it costs address space only. Ties survive,
    because a parameter that is on meta already is kept as it is.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
