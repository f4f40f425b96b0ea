"""What a transformers block takes beside its matrices, and what its attention does, measured in a model of few blocks.

The model runs as offload runs it: with kernels for norms, rotary embedding and attention of new tokens, or exactly,
with torch's own ops. It is built from the checkpoint's own configuration, at its own width, with fewer blocks and a
small vocabulary. Its matrices answer at once with memory that lies there, so what is left is norms, rotary embedding,
activation, residuals, keys and values, and Python. Models of fewer and of more blocks differ by blocks alone; the same
with an attention that answers at once, and with a real one, differ by attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.checkpoint.skeleton import build
from offload.probes.resident import resident
from offload.probes.sampling import LEAST_S, Meter, Sample
from offload.probes.subject import Subject
from offload.profile import Curve, OpTable

VOCABULARY = 512
LEAST_PART = 0.02  # of a block: less is not seen as the difference of two models
PAST = 16  # tokens before the one whose step is timed, where keys and values shall not matter
NOTHING = "offload_probe_nothing"  # the name of an attention that answers at once


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """Seconds of the model around its matrices.

    Attributes:
        tables: block (over rows), attention (over the tokens of a prompt), decode_attention (over bytes).
        step_s: what generating a token takes beside the blocks.
    """

    tables: tuple[OpTable, ...]
    step_s: float


class Blocks:
    """Times one subject's blocks.

    Args:
        subject: with a configuration.
        layers: fewer and more.
        unit_s: what entering and leaving a unit takes, which is no part of a block.
        exact: with torch's own ops only.
    """

    def __init__(
        self, subject: Subject, layers: tuple[int, int], unit_s: float, meter: Meter, *, exact: bool = False
    ) -> None:
        self._subject, self._layers, self._unit_s, self._meter, self._exact = subject, layers, unit_s, meter, exact

    def figures(self, rows: Sequence[int], tokens: Sequence[int], kv_tokens: Sequence[int]) -> BlockFigures:
        """Rows up to 64 are sequences of one token, more of them the tokens of one prompt."""
        with torch.no_grad():
            with self._models(NOTHING) as empty:
                block = [(n, *self._step(empty, n)) for n in rows if n <= 64]
                prompts = {n: self._prompt(empty, n) for n in {*tokens, *(r for r in rows if r > 64)}}
            block += [(n, *prompts[n]) for n in rows if n > 64]
            floor = self._at(block)
            with self._models("sdpa") as real:
                prefill = [(n, *self._beyond(self._prompt(real, n), prompts[n])) for n in tokens]
                decode = [(self._kv_nbytes(n), *self._beyond(self._step(real, 1, n), floor)) for n in kv_tokens]
                few, _ = real
                per_token = self._generated(few)
        blocks = self._layers[0] * (floor[0] + decode[0][1] + self._unit_s)
        heads = self._subject.heads or ()
        return BlockFigures(
            tables=(
                self._table("block", (self._subject.hidden,), "rows", block),
                self._table("attention", heads, "tokens", prefill),
                self._table("decode_attention", heads, "bytes", decode),
            ),
            step_s=max(LEAST_S, per_token - blocks),
        )

    @contextmanager
    def _models(self, attention: str) -> Iterator[tuple[nn.Module, nn.Module]]:
        few, more = (small_model(self._subject, n, attention) for n in self._layers)
        with resident(few, exact=self._exact), resident(more, exact=self._exact):
            yield few, more

    def _step(self, models: tuple[Any, Any], sequences: int, past: int = PAST) -> tuple[float, float]:
        """One new token of each sequence; (seconds, spread) of one block."""
        ids = torch.ones(sequences, 1, dtype=torch.int64)
        return self._slope([partial(m, ids, past_key_values=self._cache(m, sequences, past)) for m in models])

    def _prompt(self, models: tuple[Any, Any], tokens: int) -> tuple[float, float]:
        ids = torch.ones(1, tokens, dtype=torch.int64)
        return self._slope([partial(m, ids, use_cache=True, logits_to_keep=1) for m in models])

    def _slope(self, runs: Sequence[Callable[[], Any]]) -> tuple[float, float]:
        low, high = (self._meter.time(run) for run in runs)
        per_block = Sample((high.seconds - low.seconds) / (self._layers[1] - self._layers[0]), high.spread, high.count)
        return max(LEAST_PART * per_block.seconds, LEAST_S, per_block.seconds - self._unit_s), per_block.spread

    def _beyond(self, whole: tuple[float, float], part: tuple[float, float]) -> tuple[float, float]:
        return max(LEAST_PART * part[0], whole[0] - part[0]), whole[1]

    def _at(self, points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
        return points[0][1], points[0][2]

    def _cache(self, model: Any, sequences: int, past: int) -> Any:
        """Keys and values of `past` tokens, as generating makes them."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        _, kv_heads, dim = self._subject.heads or (1, 1, 64)
        for layer in range(model.config.get_text_config(decoder=True).num_hidden_layers):
            one = torch.full((sequences, kv_heads, past, dim), 0.01, dtype=self._subject.dtype)
            cache.update(one, one.clone(), layer)
        return cache

    def _generated(self, model: Any, tokens: int = 12) -> float:
        """Seconds of a token in the model's own generation loop."""
        ids = torch.ones(1, PAST, dtype=torch.int64)
        generate = partial(model.generate, ids, do_sample=False, eos_token_id=None, pad_token_id=0)
        long, short = (self._meter.time(partial(generate, max_new_tokens=n)).seconds for n in (tokens + 1, 1))
        return max(LEAST_S, (long - short) / tokens)

    def _kv_nbytes(self, tokens: int) -> int:
        _, kv_heads, dim = self._subject.heads or (1, 1, 64)
        return 2 * kv_heads * dim * tokens * self._subject.dtype.itemsize

    def _table(self, op: str, shape: tuple[int, ...], over: Any, points: Any) -> OpTable:
        return OpTable(
            op=op,
            implementation="torch" if self._exact else "cpu",
            processor="cpu",
            format=self._subject.dtype_name,
            shape=shape,
            over=over,
            curve=Curve.of(points),
            threads=torch.get_num_threads(),
        )


def small_model(subject: Subject, layers: int, attention: str) -> nn.Module:
    """The subject's architecture with so many blocks, whose matrices and experts answer at once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NOTHING, _no_attention)
    config = copy.deepcopy(subject.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size = layers, min(VOCABULARY, text.vocab_size)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    model = build(config, subject.dtype, attn_implementation=attention)
    for module in model.modules():
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            outputs = module.out_features if type(module) is nn.Linear else module.nf
            module.forward = _Answer(int(outputs))  # type: ignore[method-assign, assignment]
        elif any(p is not None and p.dim() > 2 for p in module._parameters.values()):  # a stack of experts
            module.forward = lambda x, *_, **__: x  # type: ignore[method-assign]
    room = torch.full((max(_numel(p) for p in model.parameters()),), 0.01, dtype=subject.dtype)
    for module in model.modules():  # all parameters share their memory: no block reads much of it
        for name, parameter in module._parameters.items():
            if parameter is not None:
                real = room[: _numel(parameter)].view(parameter.shape)
                module._parameters[name] = nn.Parameter(real, requires_grad=False)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    return model


class _Answer:
    """A product that takes no time: one tensor for each shape of its input."""

    def __init__(self, outputs: int) -> None:
        self._outputs = outputs
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self._outputs)
        if shape not in self._known:
            self._known[shape] = torch.full(shape, 0.01, dtype=x.dtype)
        return self._known[shape]


def _no_attention(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    """In transformers' form: [batch, heads, tokens, dim] becomes [batch, tokens, heads, dim]."""
    return query.transpose(1, 2), None


def _numel(parameter: torch.Tensor) -> int:
    return parameter.numel()
