"""A model of few blocks whose matrices and attention take no time: what is left of it can be timed.

Matrices answer with memory that lies there, but read as much as a real one before. The clock stands still meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

from offload.checkpoint.skeleton import build
from offload.kernels import available
from offload.probes.area import Area
from offload.probes.sampling import Now
from offload.probes.subject import Subject
from offload.runtime import experts
from offload.runtime.discovery import is_conv1d
from offload.units import MIB

VOCABULARY = 512
PLACES = 4  # that results of one shape take turns in: queries and a gate beside its other half are not one tensor
TIMED = "offload_probe_timed"  # the name of sdpa under a watch
MOST_READ = 16 * MIB  # of a matrix: half of a usual cache is as good as all of it


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
    reader, answers = _Reader(area), _Answers(area)
    for module in model.modules():
        if type(module) is nn.Linear or is_conv1d(module):
            outputs = module.out_features if type(module) is nn.Linear else module.nf
            nbytes = _numel(module._parameters["weight"]) * subject.dtype.itemsize  # type: ignore[arg-type]
            module.forward = _Answer(int(outputs), partial(reader.read, nbytes), watch, answers)  # type: ignore[method-assign, assignment]
        elif (stacks := experts.stacks_of(module)) is not None:  # all but their products
            module.forward = partial(experts.mix, module, stacks, product=partial(_answer_groups, reader, watch))  # type: ignore[method-assign]
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


class _Answers:
    """Results of products by their shape: some places of the area in turn, which is memory that has been touched."""

    def __init__(self, area: Area) -> None:
        self._area, self._known = area, dict[tuple[tuple[int, ...], torch.dtype], Iterator[torch.Tensor]]()

    def next(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if (shape, dtype) not in self._known:
            places = self._area.copies(shape, dtype)[:PLACES] or [torch.full(shape, 0.01, dtype=dtype)]
            self._known[shape, dtype] = cycle(places)
        return next(self._known[shape, dtype])


class _Answer:
    """A product that takes no time by the watch."""

    def __init__(self, outputs: int, read: Callable[[], None], watch: Watch, answers: _Answers) -> None:
        self._outputs, self._read, self._watch, self._answers = outputs, read, watch, answers

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        def answer() -> torch.Tensor:
            self._read()
            return self._answers.next((*x.shape[:-1], self._outputs), x.dtype)

        return self._watch.aside(answer)  # type: ignore[no-any-return]


def _answer_groups(
    reader: _Reader, watch: Watch, x: torch.Tensor, stack: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """A product with a stack of experts that takes no time by the watch; its result is memory of its own."""

    def answer() -> torch.Tensor:
        reader.read(stack[0].numel() * stack.element_size() * sum(n > 0 for n in rows))
        return torch.full((x.shape[0], stack.shape[1]), 0.01, dtype=x.dtype)

    return watch.aside(answer)  # type: ignore[no-any-return]


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
