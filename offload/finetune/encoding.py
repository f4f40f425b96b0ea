"""From a record to token ids and labels: chat templates, what is learnt and what is not, and what is too long."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from offload.finetune.records import Completion, Conversation, Record, Text
from offload.finetune.templates import has_generation
from offload.messages import Unusable

IGNORED = -100  # a label that no loss counts, as torch's cross_entropy has it
Pair = tuple[list[int], list[int]]  # ids and labels, of one length


@dataclass(frozen=True)
class Encoded:
    """What became of one record.

    Attributes:
        sequences: ids and labels, none longer than allowed; empty when nothing of it can be learnt.
        cut: tokens that were left out because they were too many.
    """

    sequences: list[Pair]
    cut: int = 0


class Encoder:
    """Encodes records with one tokenizer.

    Args:
        tokenizer: transformers' fast tokenizer, with its chat template set.
        max_length: tokens of a sequence, at most.
        truncation_mode: auto, keep_start, keep_end, drop or split.
        assistant_only_loss, completion_only_loss: learn answers only.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        truncation_mode: str = "auto",
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
    ) -> None:
        self._tokenizer, self._max_length, self._mode = tokenizer, max_length, truncation_mode
        self._assistant_only, self._completion_only = assistant_only_loss, completion_only_loss
        self._lock = threading.Lock()  # training data is encoded ahead, while held-out data may be
        self._is_marked = bool(getattr(tokenizer, "chat_template", None)) and has_generation(tokenizer)

    def encode(self, record: Record) -> Encoded:
        """Ids and labels.

        Raises:
            Unusable: the chat template refuses the messages, or it cannot be told what the assistant says.
        """
        with self._lock:
            if isinstance(record, Conversation):
                pair = self._conversation(record)
            elif isinstance(record, Completion):
                pair = self._completion(record)
            else:
                pair = self._text(record)
        mode = self._mode if self._mode != "auto" else "split" if isinstance(record, Text) else "keep_start"
        kept = [p for p in self._shorten(pair, mode) if any(label != IGNORED for label in p[1][1:])]
        return Encoded(kept, cut=len(pair[0]) - sum(len(ids) for ids, _ in kept))

    def _shorten(self, pair: Pair, mode: str) -> list[Pair]:
        ids, labels = pair
        size = self._max_length
        if len(ids) <= size:
            return [pair]
        if mode == "drop":
            return []
        if mode == "keep_start":
            return [(ids[:size], labels[:size])]
        if mode == "keep_end":
            return [(ids[-size:], labels[-size:])]
        return [(ids[at : at + size], labels[at : at + size]) for at in range(0, len(ids), size)]

    def _text(self, record: Text) -> Pair:
        ids = list(self._tokenizer(record.text, verbose=False)["input_ids"])
        if record.is_end:
            ids = self._ended(ids)
        return ids, list(ids)

    def _completion(self, record: Completion) -> Pair:
        before = list(self._tokenizer(record.prompt, verbose=False)["input_ids"])
        ids = list(self._tokenizer(record.prompt + record.completion, verbose=False)["input_ids"])
        if ids[: len(before)] != before:  # a token lies across the border: take both as generation would meet them
            after = self._tokenizer(record.completion, add_special_tokens=False, verbose=False)["input_ids"]
            ids = before + list(after)
        ids = self._ended(ids)
        start = len(before) if self._completion_only else 0
        return ids, [IGNORED] * start + ids[start:]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _conversation(self, record: Conversation) -> Pair:
        if not self._assistant_only:
            text = self._render(record, record.messages)
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            return ids, list(ids)
        if self._is_marked and not record.answer_from:
            return self._marked(record)
        return self._by_prefixes(record)

    def _marked(self, record: Conversation) -> Pair:
        """What the template's generation blocks hold is learnt."""
        try:
            found = self._tokenizer.apply_chat_template(
                record.messages,
                tools=record.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from None
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]

    def _by_prefixes(self, record: Conversation) -> Pair:
        """What the template adds for each answer, after what it would ask the model to go on from, is learnt."""
        text = self._render(record, record.messages)
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        labels = [IGNORED] * len(ids)
        special = set(self._tokenizer.all_special_ids)
        for start, end in self._answers(record, text):
            inside = [k for k, (a, b) in enumerate(offsets) if start <= a < end and b > a]
            while (
                len(inside) > 1
                and not text[slice(*offsets[inside[-1]])].strip()
                and (special.intersection(ids[k] for k in inside[:-1]))
            ):  # the line break after the end token is the template's, not the model's
                inside.pop()
            for k in inside:
                labels[k] = ids[k]
        return ids, labels

    def _answers(self, record: Conversation, text: str) -> list[tuple[int, int]]:
        """First character of each answer, and the one after its last, in the rendered text."""
        found = []
        for k, message in enumerate(record.messages):
            if message["role"] != "assistant" or k < record.answer_from:
                continue
            before = self._render(record, record.messages[:k], asks=True) if k else ""
            after = self._render(record, record.messages[: k + 1])
            if not text.startswith(before):
                before = self._render(record, record.messages[:k]) if k else ""
            if text.startswith(after) and after.startswith(before):
                found.append((len(before), len(after)))
                continue
            content = message["content"].strip() if isinstance(message.get("content"), str) else ""
            at = text.find(content, len(before)) if content and text.startswith(before) else -1
            if at < 0:
                raise Unusable(
                    "it cannot be told where the chat template puts the assistant's words; take a template with "
                    "generation blocks (data.chat_template), or learn everything (data.assistant_only_loss=false)"
                )
            found.append((len(before), self._past_end(text, at + len(content))))
        return found

    def _past_end(self, text: str, at: int) -> int:
        """Past the end token, where one follows."""
        end = self._tokenizer.eos_token
        return at + len(end) if end and text.startswith(end, at) else at

    def _render(self, record: Conversation, messages: list[Any], *, asks: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=record.tools, tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise Unusable(f"the chat template refuses it: {error}") from None
        return str(text)
