"""Which token comes next: the likeliest, or one drawn from random numbers that each sequence has for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from offload.generate.many import seed_of
from offload.generate.prompts import Prompt, Settings

_ROW_BY_ROW = frozenset(
    ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
     "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "InfNanRemoveLogitsProcessor")
)  # fmt: skip
"""transformers' processors of logits that look at nothing else, and treat each row alone."""


class Chooser:
    """Chooses as the model's own generate does, with its processors of logits, whatever sequences come together.

    Args:
        model: a transformers model; its generation_config says what it does unless told otherwise.
        new_tokens: asked for, at most.
        sample: draw, instead of taking the likeliest.
        temperature, top_p: None: the model's own.
        seed: of drawing; a sequence's numbers follow from it and the sequence's own number.
        stops_at_eos: end tokens end a sequence.
        is_alike: all sequences draw the same numbers: those of the seed alone.

    Attributes:
        ends: tokens that end a sequence.
    """

    def __init__(
        self,
        model: Any,
        *,
        new_tokens: int,
        sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stops_at_eos: bool = True,
        is_alike: bool = False,
    ) -> None:
        given: dict[str, Any] = {"do_sample": sample, "max_new_tokens": new_tokens}
        if sample:
            given |= {k: v for k, v in (("temperature", temperature), ("top_p", top_p)) if v is not None}
        else:
            given |= {"temperature": None, "top_p": None, "top_k": None}
        if not stops_at_eos:
            given["eos_token_id"] = None
        self._model, self._sample, self._seed, self._is_alike = model, sample, seed, is_alike
        self._config, _ = model._prepare_generation_config(None, **given)
        if self._config.num_beams not in (None, 1):
            raise ValueError("beams are not chosen here")
        end = self._config.eos_token_id
        self.ends = frozenset(() if end is None else (end,) if isinstance(end, int) else end)
        model._prepare_special_tokens(self._config, True, device=torch.device("cpu"))
        self._processors: dict[int, Any] = {}
        self._streams: dict[int, torch.Generator] = {}

    def __call__(self, logits: torch.Tensor, sequences: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """The next token of each.

        Args:
            logits: [sequences, vocabulary].
            sequences: number, tokens of its prompt, and all its tokens so far, of each.
        """
        scores = logits.to("cpu", torch.float32)
        processors = [self._of(prompt_tokens) for _, prompt_tokens, _ in sequences]
        kinds = {type(p).__name__ for chosen in processors for p in chosen}
        if kinds and kinds <= _ROW_BY_ROW:
            scores = processors[0](None, scores)
        elif kinds:
            rows = [
                chosen(torch.tensor([tokens]), row[None])
                for chosen, row, (_, _, tokens) in zip(processors, scores, sequences, strict=True)
            ]
            scores = torch.cat(rows)
        if not self._sample:
            return scores.argmax(-1).tolist()
        chances = scores.softmax(-1)
        drawn = [
            torch.multinomial(row, 1, generator=self._stream(number))
            for row, (number, _, _) in zip(chances, sequences, strict=True)
        ]
        return torch.cat(drawn).tolist()

    def _of(self, prompt_tokens: int) -> Any:
        """The processors for a sequence whose prompt has so many tokens: some begin to work that many later."""
        if prompt_tokens not in self._processors:
            self._processors[prompt_tokens] = self._model._get_logits_processor(
                generation_config=self._config, input_ids_seq_length=prompt_tokens, device="cpu", model_kwargs={}
            )
        return self._processors[prompt_tokens]

    def _stream(self, number: int) -> torch.Generator:
        if number not in self._streams:
            self._streams[number] = torch.Generator().manual_seed(seed_of(self._seed, 0 if self._is_alike else number))
        return self._streams[number]


class Choosers:
    """A chooser for each group of prompts that have the same settings.

    Args:
        model: as for `Chooser`.
        prompts: with settings of their own, or none.
        new_tokens: of those that do not say themselves.
        asked: temperature, top_p and seed of those that do not say themselves, and whether they draw.
        stops_at_eos: end tokens end a sequence.

    Attributes:
        ends: tokens that end a sequence.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], *, new_tokens: int, asked: Asked, stops_at_eos: bool = True
    ) -> None:
        self._of_prompt = {p.index: p.settings for p in prompts}
        self._choosers = {
            settings: Chooser(
                model,
                new_tokens=settings.max_new_tokens or new_tokens,
                stops_at_eos=stops_at_eos,
                is_alike=settings.seed is not None,
                **asked.beside(settings),
            )
            for settings in set(self._of_prompt.values())
        }
        self.ends = next(iter(self._choosers.values())).ends

    def __call__(self, logits: torch.Tensor, sequences: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """See `Chooser`; a sequence's number is the index of its prompt."""
        groups: dict[Settings, list[int]] = {}
        for row, (number, _, _) in enumerate(sequences):
            groups.setdefault(self._of_prompt[number], []).append(row)
        chosen = [0] * len(sequences)
        for settings, rows in groups.items():
            found = self._choosers[settings](
                logits if len(groups) == 1 else logits[torch.tensor(rows, device=logits.device)],
                [sequences[row] for row in rows],
            )
            for row, token in zip(rows, found, strict=True):
                chosen[row] = token
        return chosen


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says of drawing; None: the model's own."""

    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def beside(self, own: Settings) -> dict[str, Any]:
        """The same for a prompt with settings of its own, as a `Chooser` takes it."""
        draws = own.temperature > 0 if own.temperature is not None else self.sample or own.top_p is not None
        if not draws:
            return {"sample": False}
        first = {
            name: a if (a := getattr(own, name)) is not None else getattr(self, name)
            for name in ("temperature", "top_p", "seed")
        }
        return {"sample": True, **first}
