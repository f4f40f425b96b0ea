"""What a transformers block takes beside its matrices, and what its attention does, measured in a model of few blocks.

The model runs as offload runs it: with kernels for norms and rotary embedding, or exactly, with torch's own ops. It is
built from the checkpoint's own configuration, at its own width, with fewer blocks and a small vocabulary. Its matrices
answer with memory that lies there, but read as much as a real one before, so that whatever comes behind them finds the
caches as cold as in a run. A clock that stands still meanwhile leaves norms, rotary embedding, activation, residuals,
keys and values, and Python. Attention is timed call by call in the same model. What models of fewer and of more blocks
differ by is a block; what is left of a generated token is the loop around the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.errors import ModelError
from offload.probes.area import Area
from offload.probes.resident import resident
from offload.probes.sampling import LEAST_S, Meter, Sample
from offload.probes.small import Watch, small_model
from offload.probes.subject import Subject
from offload.profile import Curve, OpTable

LEAST_PART = 0.02  # of a block: less is not seen as the difference of two models
PAST = 16  # tokens before the one whose step is timed, where keys and values shall not matter
NEW = 12  # tokens of a generation
MODEL_ERRORS = AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError
WAIT_S = 0.008  # as long as a read of 25 MB: threads sleep by then
PART_S = 1 / 3  # of an op's time for a point: all the reading is not counted, and takes more than what is


@dataclass(frozen=True, kw_only=True)
class BlockFigures:
    """Seconds of the model around its matrices.

    Attributes:
        tables: block (over rows), attention (over the tokens of a prompt), decode_attention (over bytes).
        step_s: what generating a token takes beside the blocks.
        start_s: what generating takes once, before the first of them.
        waking_s: what a block that was waited for takes beyond one that follows another at once.
    """

    tables: tuple[OpTable, ...]
    step_s: float
    start_s: float
    waking_s: float


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
        self._meter = Meter(meter.rounds, meter.point_s * PART_S, now=self._watch, allowance=meter.allowance)
        self._area = area

    def figures(self, rows: Sequence[int], tokens: Sequence[int], kv_tokens: Sequence[int]) -> BlockFigures:
        """Rows up to 64 are sequences of one token, more of them the tokens of one prompt.

        Raises:
            ModelError: the model's own code fails on a small model.
        """
        with torch.no_grad(), self._models() as models:
            block = [(n, *self._step(models, n)[0]) for n in rows if n <= 64]
            prompts = {n: self._prompt(models, n) for n in sorted({*tokens, *(r for r in rows if r > 64)})}
            block += [(n, *prompts[n][0]) for n in rows if n > 64]
            prefill = [(n, *prompts[n][1]) for n in tokens]
            decode = [(self._kv_nbytes(n), *self._step(models, 1, n)[1]) for n in kv_tokens]
            waking_s = self._waking(models[1])
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
            waking_s=waking_s,
        )

    @contextmanager
    def _models(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        few, more = (self._tried(n) for n in self._layers)
        with resident(few, exact=self._exact), resident(more, exact=self._exact):
            yield few, more

    def _tried(self, layers: int) -> nn.Module:
        """A small model that has run. What its own code raises before tells of the model; later it would be a fault."""
        try:
            model: Any = small_model(self._subject, layers, self._watch, self._area)
            with resident(model, exact=self._exact):
                for run in (self._prompts(model, 2), self._steps(model, 1, PAST)):
                    run()
        except MODEL_ERRORS as error:
            raise ModelError(f"a model of {layers} layers fails: {type(error).__name__}: {error}") from error
        return model  # type: ignore[no-any-return]

    def _step(self, models: tuple[Any, Any], sequences: int, past: int = PAST) -> tuple[Pair, Pair]:
        """One new token of each sequence; (seconds, spread) of one block, and of its attention."""
        return self._slope([self._steps(m, sequences, past) for m in models])

    def _steps(self, model: Any, sequences: int, past: int) -> Callable[[], Any]:
        ids = torch.ones(sequences, 1, dtype=torch.int64)
        return partial(model, ids, past_key_values=self._cache(model, sequences, past))

    def _prompt(self, models: tuple[Any, Any], tokens: int) -> tuple[Pair, Pair]:
        return self._slope([self._prompts(m, tokens) for m in models])

    def _prompts(self, model: Any, tokens: int) -> Callable[[], Any]:
        return partial(model, torch.ones(1, tokens, dtype=torch.int64), use_cache=True, logits_to_keep=1)

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

    def _waking(self, model: Any) -> float:
        """A step whose every block is waited for, beside one in which they follow each other, for each block.

        All of it counts, matrices too: their threads have gone to sleep, caches are cold, and the processors may have
        been lent to somebody else.
        """
        clock = Watch(self._watch.now)
        meter = Meter(self._meter.rounds, self._meter.point_s, now=clock, allowance=self._meter.allowance)
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
        layers = next((found for found in lists if len(found) == self._layers[1]), None)
        if layers is None:
            return LEAST_S
        run = self._steps(model, 1, PAST)
        at_once = meter.time(run).seconds
        wait = partial(clock.aside, partial(time.sleep, WAIT_S if self._meter.point_s else 0.0))
        hooks = [layer.register_forward_pre_hook(lambda *_: wait()) for layer in layers]
        try:
            waited = meter.time(run).seconds
        finally:
            for hook in hooks:
                hook.remove()
        return max(LEAST_S, (waited - at_once) / len(layers))

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
