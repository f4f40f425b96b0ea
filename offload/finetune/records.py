"""One record of training data, in whichever shape it was written, as a conversation, a completion or a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offload.errors import UsageError
from offload.messages import Message, Unusable, check_messages

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "assistant",
}  # fmt: skip
"""Names that sharegpt files give to roles."""


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content, for a chat template.

    Attributes:
        tools: what the template is told of functions that may be called.
        answer_from: only assistants' messages from this one on are answers to learn.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    answer_from: int = 0


@dataclass(frozen=True)
class Completion:
    """A text and how it goes on. No template is applied."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        is_end: nothing follows, so an end token does.
    """

    text: str
    is_end: bool = field(default=True)


Record = Conversation | Completion | Text


def detect(record: Mapping[str, Any]) -> str:
    """The format of a record, by its keys.

    Raises:
        Unusable: no format has these keys.
    """
    for name, (keys, _) in FORMATS.items():
        if keys <= record.keys():
            return name
    known = "; ".join(f"{n}: {', '.join(sorted(k))}" for n, (k, _) in FORMATS.items())
    raise Unusable(f"has the keys {', '.join(map(repr, record)) or '(none)'}, and no format does ({known})")


def parse(record: Any, format: str) -> Record:
    """The record of a line.

    Raises:
        Unusable: it lacks keys of the format, or a value has another type than it must.
    """
    if not isinstance(record, dict):
        raise Unusable(f"is not an object with keys and values but {type(record).__name__}")
    if format not in FORMATS:
        raise UsageError(f"format={format!r} is not known; known are auto, {', '.join(FORMATS)}")
    keys, make = FORMATS[format]
    if missing := sorted(keys - record.keys()):
        raise Unusable(f"lacks {', '.join(map(repr, missing))}, which the format {format} needs")
    return make(record)


def _messages(record: Mapping[str, Any]) -> Record:
    return Conversation(check_messages(record["messages"], "messages", needs_answer=True), record.get("tools"))


def _sharegpt(record: Mapping[str, Any]) -> Record:
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise Unusable("'conversations' is not a list of turns")
    found: list[Message] = []
    if isinstance(record.get("system"), str) and record["system"]:
        found.append({"role": "system", "content": record["system"]})
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in SPEAKERS:
            raise Unusable(f"a turn is from {speaker!r}; known are {', '.join(SPEAKERS)}")
        found.append({"role": SPEAKERS[speaker], "content": turn.get("value")})
    return Conversation(check_messages(found, "conversations", needs_answer=True))


def _prompt_completion(record: Mapping[str, Any]) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = check_messages(prompt, "prompt", needs_answer=False)
        after = check_messages(completion, "completion", needs_answer=True)
        return Conversation(before + after, record.get("tools"), answer_from=len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise Unusable("'prompt' and 'completion' must both be texts, or both lists of messages")
    if not completion:
        raise Unusable("'completion' is empty, so there is nothing to learn")
    return Completion(prompt, completion)


def _alpaca(record: Mapping[str, Any]) -> Record:
    parts = {key: record.get(key) or "" for key in ("system", "instruction", "input", "output")}
    if wrong := [key for key, value in parts.items() if not isinstance(value, str)]:
        raise Unusable(f"{wrong[0]!r} is not a text")
    messages: list[Message] = []
    if parts["system"]:
        messages.append({"role": "system", "content": parts["system"]})
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
            raise Unusable("'history' must hold pairs of instruction and output")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = "\n\n".join(filter(None, (parts["instruction"], parts["input"])))
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": parts["output"]}]
    return Conversation(check_messages(messages + said, "output", needs_answer=True), answer_from=len(messages))


def _text(record: Mapping[str, Any]) -> Record:
    if not isinstance(record["text"], str) or not record["text"]:
        raise Unusable("'text' is not a text, or empty")
    return Text(record["text"])


FORMATS: dict[str, tuple[frozenset[str], Callable[[Mapping[str, Any]], Record]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "prompt_completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "text": (frozenset({"text"}), _text),
}
"""Each format's keys, and what makes a record of them. Those that are tried first come first."""
