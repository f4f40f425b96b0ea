"""What is measured for: the shapes, formats, heads and files of a model, or a set of common ones without a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.checkpoint import Opened
from offload.specs import ModelSpec, TensorSpec

Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, as far as measuring goes.

    Attributes:
        name: of the profile.
        dtype: that it computes in.
        matrices: format of weights -> (outputs, inputs) of products.
        transposed: (outputs, inputs) of plain ones that lie as [inputs, outputs].
        stacks: (outputs, inputs) of one expert's matrix -> how many experts a token chooses.
        heads: (query heads, key heads, head dimension), or None where they are unknown.
        hidden: numbers of a token's hidden state.
        max_tokens: of a sequence; None where the model does not say.
        config: transformers' configuration, to build a block from; None without one.
        files: to read from; none: a scratch file is made.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    matrices: dict[str, tuple[Shape, ...]] = field(default_factory=dict)
    transposed: tuple[Shape, ...] = ()
    stacks: dict[Shape, int] = field(default_factory=dict)
    heads: tuple[int, int, int] | None = None
    hidden: int = 0
    max_tokens: int | None = None
    config: Any = None
    files: tuple[Path, ...] = ()

    def fitting(self, tokens: Iterable[int], beside: int = 0) -> tuple[int, ...]:
        """Those numbers of tokens that the model's context holds, `beside` others; the largest there is if none is."""
        most = (self.max_tokens or 1 << 62) - beside
        return tuple(dict.fromkeys(max(1, min(n, most)) for n in tokens))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of all formats."""
        return tuple(dict.fromkeys(shape for shapes in self.matrices.values() for shape in shapes))

    @property
    def largest(self) -> tuple[Shape, ...]:
        """Of all matrices, whatever their layout, from the largest down."""
        every = {*self.shapes, *self.transposed, *self.stacks}
        return tuple(sorted(every, key=lambda s: (s[0] * s[1], s), reverse=True))


def of_model(name: str, opened: Opened) -> Subject:
    """From a checkpoint's headers."""
    spec = opened.spec
    matrices: dict[str, dict[Shape, None]] = {spec.dtype: {}}
    products = [t for unit in spec.units for t in unit.tensors if t.width and not t.is_table]
    for tensor in (t for t in products if not t.is_transposed and not t.experts):
        for format in {tensor.format or spec.dtype, tensor.stored_format or spec.dtype}:
            matrices.setdefault(format, {})[_shape(tensor)] = None
            matrices[_dtype(spec)][_shape(tensor)] = None
    files = {piece.extent.path for source in opened.sources.values() for piece in source.pieces}
    return Subject(
        name=name,
        dtype=getattr(torch, _dtype(spec)),
        matrices={format: tuple(shapes) for format, shapes in matrices.items() if shapes},
        transposed=tuple(dict.fromkeys(_shape(t) for t in products if t.is_transposed)),
        stacks={_shape(t): t.chosen for t in products if t.experts},
        heads=(spec.heads, spec.kv_heads, spec.head_dim) if spec.heads and spec.kv_layers else None,
        hidden=spec.hidden_nbytes // getattr(torch, _dtype(spec)).itemsize,
        max_tokens=spec.max_tokens,
        config=getattr(opened.model, "config", None),
        files=tuple(sorted(map(Path, files), key=lambda f: f.stat().st_size, reverse=True)),
    )


def common() -> Subject:
    """Shapes of a Llama of 8 billion parameters, and of experts: other shapes are scaled from them."""
    from transformers import LlamaConfig

    hidden, wide = 4096, 14336
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32
    )
    return Subject(
        name="machine",
        matrices={"bfloat16": ((1024, hidden), (hidden, hidden), (wide, hidden), (hidden, wide))},
        transposed=((hidden, hidden),),
        stacks={(1536, 2048): 8, (2048, 768): 8},  # Qwen3-30B-A3B's
        heads=(32, 8, 128),
        hidden=hidden,
        config=config,
    )


def _dtype(spec: ModelSpec) -> str:
    return spec.dtype if spec.dtype in ("bfloat16", "float16", "float32") else "bfloat16"


def _shape(tensor: TensorSpec) -> Shape:
    return tensor.elements // tensor.width // max(1, tensor.experts), tensor.width
