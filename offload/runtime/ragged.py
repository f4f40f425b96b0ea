"""Ragged passes: tokens of many sequences, of some a whole prompt and of others the next one, in one row of the model.

Products, norms and activations treat every token alike, so all tokens of a pass are one matrix, without any padding
(Orca's selective batching, Yu et al., OSDI 2022). Only attention knows whose tokens they are:

    input_ids   | a | b | c | d d d d d d d | e e e |      a, b, c: the next token of each; d, e: prompts
    positions   | 9 | 4 | 7 | 0 1 2 3 4 5 6 | 0 1 2 |

transformers' models look their attention up by a name in their configuration. A name of our own stands there during a
pass, for which no mask is made; it writes keys and values into a pool and reads each sequence's from its run there.

Logits are made of each sequence's last token, so the last layer computes with these rows alone (last_layer.py): 127 of
128 rows of a prompt do not pass through most of it.

What a sequence gets does not depend on its company, nor on whether there is any: prompts are never cut, attention sees
one sequence, and every product has at least MIN_ROWS rows. On the CPU torch multiplies 16-bit matrices so that a row of
the result depends on no other row, and not on their number from two rows on; a single row goes another way. A CUDA
library chooses its kernels by the number of rows, so there company may change a rounding.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from offload.errors import ModelError
from offload.kernels.chosen import Kernels
from offload.runtime.attention import has_its_own_attention
from offload.runtime.last_layer import Enough, among_rows, last_layer, of_rows, replace_forward
from offload.runtime.lookups import say
from offload.runtime.pool import KeyValuePool

MIN_ROWS = 8  # more than any kernel for few rows takes (kernels/cpu/linear.py)
SHORT = 512  # tokens of a prompt up to which the kernel for new tokens is faster than torch's for prompts
_KINDS = {None, "full_attention", "sliding_attention"}  # of layers, that this attention computes
_COMPANY = {"dynamic", "longrope"}  # rotary embeddings that depend on the longest sequence of a pass
_UNKNOWN = ("position_bias", "cache", "softcap", "s_aux")  # what attention may be asked for and does not do here
_numbers = itertools.count(1)


@dataclass
class Span:
    """A sequence's tokens in the pool.

    Attributes:
        start: where its run begins.
        length: tokens that are there.
    """

    start: int
    length: int = 0


class Refused(ModelError):
    """The model cannot run ragged passes after all, which its first one showed."""


def refuses(model: nn.Module) -> str | None:
    """Why a model cannot run ragged passes, as far as it says itself; None when it can."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return "it is no transformers model"
    if config.get_text_config(decoder=True) is not config:
        return "it is more than a language model"
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", True):
        return "its attention cannot be exchanged, or it keeps another state than keys and values"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps scores"  # which some versions of transformers would leave out with sdpa
    if config._attn_implementation != "sdpa" or has_its_own_attention(model):
        return f"its attention is not torch's own but {config._attn_implementation} or of its own making"
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(map(str, kinds)))}"
    rope = str(getattr(config, "rope_parameters", None))
    if any(f"'{kind}'" in rope for kind in _COMPANY):
        return "its rotary embedding depends on the longest sequence"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "it cannot be asked for some tokens' logits"
    return None


class Ragged:
    """Runs ragged passes through a model. A context manager; between passes the model is as it was.

    Args:
        model: a transformers model that `refuses` finds nothing against, with kernels installed or not.
        kernels: what computes attention of single tokens and short prompts; torch's sdpa does the rest.
        pool: keys and values of all sequences.
    """

    def __init__(self, model: Any, kernels: Kernels, pool: KeyValuePool) -> None:
        self._model, self._kernels, self.pool = model, kernels, pool
        self._name = f"offload-ragged-{next(_numbers)}"
        self._configs = {
            id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "get_text_config")
        }
        self._pass: _Pass | None = None
        self._is_proven = False
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> Ragged:
        from transformers import AttentionInterface

        AttentionInterface.register(self._name, self._attend)
        if (last := last_layer(self._model, self.pool.layers)) is not None:
            self._restore = replace_forward(last, self._last_layer(last.forward))
        return self

    def __exit__(self, *error: object) -> None:
        from transformers import AttentionInterface

        self._restore()
        AttentionInterface._global_mapping.pop(self._name, None)

    def forward(self, work: Sequence[tuple[Span, Sequence[int]]]) -> torch.Tensor:
        """One pass: the given tokens of each sequence follow those of its span, which grows by them.

        Args:
            work: sequences that have a run each, and their next tokens: one, or a whole prompt for an empty span.

        Returns:
            Logits of each one's last token, [sequences, vocabulary], in the model's dtype.

        Raises:
            Vanished: this transformers would not look its attention up.
            Refused: the model did not do what a ragged pass needs.
        """
        order = sorted(range(len(work)), key=lambda i: len(work[i][1]) > 1)  # single tokens first
        now = _Pass([work[i] for i in order], self.pool.scrap, self.pool.torch_device)
        self._pass, restore = now, say(self._configs.values(), "attn", self._name)
        try:
            with torch.no_grad():
                logits = self._model(
                    input_ids=now.ids[None],
                    position_ids=now.positions[None],
                    use_cache=False,
                    logits_to_keep=now.last,
                ).logits[0]
        finally:
            self._pass = None
            restore()
        if not self._is_proven and now.layers != set(range(self.pool.layers)):
            raise Refused(f"{len(now.layers)} of its {self.pool.layers} layers asked for attention")
        self._is_proven = True
        for span, tokens in now.work:
            span.length += len(tokens)
        found = torch.empty_like(logits[: len(order)])
        found[torch.tensor(order, device=logits.device)] = logits[: len(order)]
        return found

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' form: heads [1, heads, tokens, head_dim] in, tokens first out."""
        now, layer = self._pass, getattr(module, "layer_idx", None)
        assert now is not None, "no other pass looks this attention up"
        unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
        if layer is None or attention_mask is not None or unknown or dropout:
            what = ", ".join(unknown) or ("a mask" if attention_mask is not None else "dropout, or has no number")
            raise Refused(f"attention of {type(module).__name__} asks for {what}")
        if (why := self.pool.refuses(layer, key, value)) is not None:
            raise Refused(why)
        if now.stage != "all rows" and layer != self.pool.layers - 1:
            raise Refused(f"layer {layer} of {type(self._model).__name__} asks for attention after its last one")
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        window = kwargs.get("sliding_window")
        if now.stage == "last rows":
            out = query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])
            count = len(now.work)
            runs = now.last_first, now.last_end, now.last_most
            self._singles(layer, query[0].transpose(0, 1)[:count], runs, scale, window, out[0])
            return out, None
        self.pool.write(layer, key, value, now.places)
        now.layers.add(layer)
        if now.stage == "keys":
            raise Enough
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        out[0, now.rows :] = 0
        if now.singles:
            runs = now.first, now.end, now.most
            self._singles(layer, query[0].transpose(0, 1)[: now.singles], runs, scale, window, out[0])
        for start, end in now.prompts:
            part = slice(start, end)
            whole = query[:, :, part], key[:, :, part], value[:, :, part]
            if end - start <= SHORT and self._kernels.device == "cpu":
                by_kernel = self._kernels.attempt("decode_attention", *whole, scale=scale, window=window)
                if by_kernel is not None:
                    out[0, part] = by_kernel[0][0].transpose(0, 1)
                    continue
            mask = _band(end - start, window, query.device)
            found = functional.scaled_dot_product_attention(
                *whole, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
            out[0, part] = found[0].transpose(0, 1)
        return out, None

    def _last_layer(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The last layer's forward, in a pass with prompts for each sequence's last token only."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            now = self._pass
            if now is None or not now.prompts:
                return own(*args, **kwargs)
            now.stage, whole = "keys", len(now.ids)
            try:
                own(*args, **kwargs)
            except Enough:
                pass
            else:
                raise Refused("its last layer asks for no attention")
            now.stage = "last rows"
            some, named = of_rows(now.last, whole, (args, kwargs))
            return among_rows(now.last[: len(now.work)], whole, own(*some, **named))

        return forward

    def _singles(
        self,
        layer: int,
        query: torch.Tensor,
        runs: tuple[torch.Tensor, torch.Tensor, int],
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of one token of each sequence, query [sequences, heads, head_dim], into the first of `out`.

        Args:
            runs: where the tokens that each sees begin and end in the pool, and the most of them.
        """
        begins, ends, most = runs
        keys, values = self.pool.keys(layer), self.pool.values(layer)
        shape = (len(query), *keys.shape)
        found = self._kernels.attempt(
            "decode_attention", query, keys.expand(shape), values.expand(shape),
            scale=scale, window=window, first=begins, length=ends, most=most,
        )  # fmt: skip
        if found is not None:
            out[: len(query)] = found[0]
            return
        for row, (first, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
            seen = slice(first if window is None else max(first, end - window), end)
            out[row] = functional.scaled_dot_product_attention(
                query[row][None, :, None], keys[None, :, seen], values[None, :, seen],
                scale=scale, enable_gqa=query.shape[1] != keys.shape[0],
            )[0, :, 0]  # fmt: skip


class _Pass:
    """One pass in numbers; `work` is in the order of its rows, single tokens first.

    Attributes:
        ids, positions, places: int64 [rows, at least MIN_ROWS]: token, place in its sequence, place in the pool.
        rows: that belong to a sequence.
        last: the row of each sequence's last token, and more of the last one up to MIN_ROWS.
        singles: sequences with one token.
        first, end: of these, int64 [singles]: where their tokens begin and end in the pool.
        most: tokens of the longest of them.
        prompts: rows of the other sequences, from and to.
        last_first, last_end, last_most: the same of all sequences, for the last layer.
        layers: that have asked for attention.
        stage: what the last layer is called for, once it is.
    """

    def __init__(self, work: Sequence[tuple[Span, Sequence[int]]], scrap: int, device: torch.device) -> None:
        self.work, self.layers = work, set[int]()
        self.stage: Literal["all rows", "keys", "last rows"] = "all rows"
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        last: list[int] = []
        for span, tokens in work:
            assert len(tokens) == 1 or not span.length, "a prompt is never cut"
            if len(tokens) > 1:
                self.prompts.append((len(ids), len(ids) + len(tokens)))
            ids += tokens
            positions += range(span.length, span.length + len(tokens))
            places += range(span.start + span.length, span.start + span.length + len(tokens))
            last.append(len(ids) - 1)
        self.rows = len(ids)
        more = max(0, MIN_ROWS - len(ids))
        self.ids = torch.tensor(ids + [0] * more, device=device)
        self.positions = torch.tensor(positions + [0] * more, device=device)
        self.places = torch.tensor(places + [scrap] * more, device=device)
        self.last = torch.tensor(last + last[-1:] * max(0, MIN_ROWS - len(last)), device=device)
        lengths = [span.length + len(tokens) for span, tokens in work]
        self.singles = sum(len(tokens) == 1 for _, tokens in work)
        self.last_first = torch.tensor([span.start for span, _ in work], device=device)
        self.last_end = self.last_first + torch.tensor(lengths, device=device)
        self.last_most = max(lengths)
        self.first, self.end = self.last_first[: self.singles], self.last_end[: self.singles]
        self.most = max(lengths[: self.singles], default=0)


def _band(tokens: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """What each token of a prompt sees, [tokens, tokens]; None where that is all up to itself."""
    if window is None or tokens <= window:
        return None
    place = torch.arange(tokens, device=device)
    apart = place[:, None] - place[None]
    return (apart >= 0) & (apart < window)
