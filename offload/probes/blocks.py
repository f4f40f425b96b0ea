"""What a transformers block takes beside its matrices, and what its attention does, measured in a model of few blocks.

The model runs as offload runs it: with kernels for norms and rotary embedding, or exactly, with torch's own ops. It is
built from the checkpoint's own configuration, at its own width, with fewer blocks and a small vocabulary. Its matrices
answer with memory that lies there, but read as much as a real one before, so that whatever comes behind them finds the
caches as cold as in a run. A clock that stands still meanwhile leaves norms, rotary embedding, activation, residuals,
keys and values, and Python. Attention is timed call by call in the same model. What models of fewer and of more blocks
differ by is a block; what is left of a generated token is the loop around the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.checkpoint.skeleton import build
from offload.kernels import available
from offload.probes.area import Area
from offload.probes.resident import resident
from offload.probes.sampling import LEAST_S, Meter, Now, Sample
from offload.probes.subject import Subject
from offload.profile import Curve, OpTable
from offload.units import MIB

VOCABULARY = 512
LEAST_PART = 0.02  # of a block: less is not seen as the difference of two models
PAST = 16  # tokens before the one whose step is timed, where keys and values shall not matter
NEW = 12  # tokens of a generation
TIMED = "offload_probe_timed"  # the name of sdpa under a watch
MOST_READ = 16 * MIB  # of a matrix: half of a usual cache is as good as all of it
PART_S = 1 / 3  # of an op's time for a point: all the reading is not counted, and takes more than what is


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """Seconds of the model around its matrices.

    Attributes:
        tables: block (over rows), attention (over the tokens of a prompt), decode_attention (over bytes).
        step_s: what generating a token takes beside the blocks.
        start_s: what generating takes once, before the first of them.
    """

    tables: tuple[OpTable, ...]
    step_s: float
    start_s: float


@dataclass
class Watch:
    """A clock that stands still while something runs whose time is told elsewhere.

    Attributes:
        now: the clock that goes on.
        attention_s: seconds of each attention since somebody cleared it.
    """

    now: Now
    aside_s: float = 0.0
    attention_s: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now() - self.aside_s

    def aside(self, run: Callable[[], Any]) -> Any:
        began = self.now()
        try:
            return run()
        finally:
            self.aside_s += self.now() - began


Pair = tuple[float, float]
"""Seconds and their relative spread."""


class Blocks:
    """Times one subject's blocks.

    Args:
        subject: with a configuration.
        layers: fewer and more.
        unit_s: what entering and leaving a unit takes, which is no part of a block.
        area: memory that matrices read.
        exact: with torch's own ops only.
    """

    def __init__(
        self,
        subject: Subject,
        layers: tuple[int, int],
        unit_s: float,
        meter: Meter,
        area: Area,
        *,
        exact: bool = False,
    ) -> None:
        self._subject, self._layers, self._unit_s, self._exact = subject, layers, unit_s, exact
        self._watch = Watch(meter.now)
        self._meter = Meter(meter.rounds, meter.point_s * PART_S, now=self._watch)
        self._area = area

    def figures(self, rows: Sequence[int], tokens: Sequence[int], kv_tokens: Sequence[int]) -> BlockFigures:
        """Rows up to 64 are sequences of one token, more of them the tokens of one prompt."""
        with torch.no_grad(), self._models() as models:
            block = [(n, *self._step(models, n)[0]) for n in rows if n <= 64]
            prompts = {n: self._prompt(models, n) for n in sorted({*tokens, *(r for r in rows if r > 64)})}
            block += [(n, *prompts[n][0]) for n in rows if n > 64]
            prefill = [(n, *prompts[n][1]) for n in tokens]
            decode = [(self._kv_nbytes(n), *self._step(models, 1, n)[1]) for n in kv_tokens]
            start_s, step_s = self._generated(models[0], block[0][1], self._prompt(models, PAST)[0][0])
        heads = self._subject.heads or ()
        return BlockFigures(
            tables=(
                self._table("block", (self._subject.hidden,), "rows", block),
                self._table("attention", heads, "tokens", prefill),
                self._table("decode_attention", heads, "bytes", decode),
            ),
            step_s=step_s,
            start_s=start_s,
        )

    @contextmanager
    def _models(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        few, more = (small_model(self._subject, n, self._watch, self._area) for n in self._layers)
        with resident(few, exact=self._exact), resident(more, exact=self._exact):
            yield few, more

    def _step(self, models: tuple[Any, Any], sequences: int, past: int = PAST) -> tuple[Pair, Pair]:
        """One new token of each sequence; (seconds, spread) of one block, and of its attention."""
        ids = torch.ones(sequences, 1, dtype=torch.int64)
        return self._slope([partial(m, ids, past_key_values=self._cache(m, sequences, past)) for m in models])

    def _prompt(self, models: tuple[Any, Any], tokens: int) -> tuple[Pair, Pair]:
        ids = torch.ones(1, tokens, dtype=torch.int64)
        return self._slope([partial(m, ids, use_cache=True, logits_to_keep=1) for m in models])

    def _slope(self, runs: Sequence[Callable[[], Any]]) -> tuple[Pair, Pair]:
        low = self._meter.time(runs[0])
        self._watch.attention_s.clear()
        high = self._meter.time(runs[1])
        attention = Sample.of(self._watch.attention_s or [LEAST_S])
        per_block = (high.seconds - low.seconds) / (self._layers[1] - self._layers[0])
        least = max(LEAST_PART * high.seconds / self._layers[1], LEAST_S)
        block = max(least, per_block - self._unit_s), high.spread
        return block, (max(LEAST_S, attention.seconds), attention.spread)

    def _cache(self, model: Any, sequences: int, past: int) -> Any:
        """Keys and values of `past` tokens, as generating makes them."""
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        _, kv_heads, dim = self._subject.heads or (1, 1, 64)
        for layer in range(model.config.get_text_config(decoder=True).num_hidden_layers):
            one = torch.full((sequences, kv_heads, past, dim), 0.01, dtype=self._subject.dtype)
            cache.update(one, one.clone(), layer)
        return cache

    def _generated(self, model: Any, block_s: float, first_block_s: float) -> Pair:
        """Seconds of the model's own generation loop, once and for each token, beside its blocks."""
        ids = torch.ones(1, PAST, dtype=torch.int64)
        generate = partial(model.generate, ids, do_sample=False, eos_token_id=None, pad_token_id=0)
        long, short = (self._meter.time(partial(generate, max_new_tokens=n)).seconds for n in (NEW + 1, 1))
        step = max(LEAST_S, (long - short) / NEW - self._layers[0] * (block_s + self._unit_s))
        return max(LEAST_S, short - step - self._layers[0] * (first_block_s + self._unit_s)), step

    def _kv_nbytes(self, tokens: int) -> int:
        _, kv_heads, dim = self._subject.heads or (1, 1, 64)
        return 2 * kv_heads * dim * tokens * self._subject.dtype.itemsize

    def _table(self, op: str, shape: tuple[int, ...], over: Any, points: Any) -> OpTable:
        is_torch = self._exact or op != "block"  # attention of a prompt is torch's in any case
        return OpTable(
            op=op,
            implementation="torch" if is_torch else "cpu",
            processor="cpu",
            format=self._subject.dtype_name,
            shape=shape,
            over=over,
            curve=Curve.of(points),
            threads=torch.get_num_threads(),
        )


def small_model(subject: Subject, layers: int, watch: Watch, area: Area) -> nn.Module:
    """The subject's architecture with so many blocks, whose matrices and attention run aside of the watch."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(TIMED, _timed(ALL_ATTENTION_FUNCTIONS["sdpa"], watch))
    AttentionMaskInterface.register(TIMED, sdpa_mask)
    config = copy.deepcopy(subject.config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size = layers, min(VOCABULARY, text.vocab_size)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    model = build(config, subject.dtype, attn_implementation=TIMED)
    reader = _Reader(area)
    for module in model.modules():
        if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
            outputs = module.out_features if type(module) is nn.Linear else module.nf
            nbytes = _numel(module._parameters["weight"]) * subject.dtype.itemsize  # type: ignore[arg-type]
            module.forward = _Answer(int(outputs), partial(reader.read, nbytes), watch)  # type: ignore[method-assign, assignment]
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


class _Reader:
    """Reads an area piece by piece, with all threads, so that caches hold what a product would have left in them."""

    def __init__(self, area: Area) -> None:
        self._area, self._at = area.bytes, 0
        self._by_kernel = available()["cpu"] == "yes"

    def read(self, nbytes: int) -> None:
        nbytes = min(nbytes, MOST_READ, self._area.numel()) // MIB * MIB
        if not nbytes:
            return
        if self._at + nbytes > self._area.numel():
            self._at = 0
        piece = self._area[self._at : self._at + nbytes]
        self._at += nbytes
        if self._by_kernel:
            from offload.kernels.cpu import bandwidth

            bandwidth.read(piece)
        else:
            piece.view(torch.float32).sum()


class _Answer:
    """A product that takes no time by the watch: one tensor for each shape of its input."""

    def __init__(self, outputs: int, read: Callable[[], None], watch: Watch) -> None:
        self._outputs, self._read, self._watch = outputs, read, watch
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self._watch.aside(self._read)
        shape = (*x.shape[:-1], self._outputs)
        if shape not in self._known:
            self._known[shape] = torch.full(shape, 0.01, dtype=x.dtype)
        return self._known[shape]


def _timed(attention: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    """An attention in transformers' form whose time is kept, call by call."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        before = watch.aside_s
        found = watch.aside(lambda: attention(*args, **kwargs))
        watch.attention_s.append(watch.aside_s - before)
        return found

    return attend


def _numel(parameter: torch.Tensor) -> int:
    return parameter.numel()
