"""A file of prompts as token ids: JSON lines or plain text, every line checked before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from jinja2.exceptions import TemplateError

from offload.errors import DataError, UsageError
from offload.generate.single import check_ids, encode
from offload.messages import Unusable, check_messages
from offload.specs import check_length

JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
BOM = b"\xef\xbb\xbf"
NAMED = 20  # bad lines that an error names; the others are counted
KEYS = ("messages", "prompt", "prompt_ids")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its place among the file's prompts, from 0.
        line: its line in the file, from 1.
        ids: its tokens.
    """

    index: int
    line: int
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a prompt must keep to.

    Attributes:
        vocabulary: token ids are smaller than this; None: not known.
        max_tokens: the model's context; None: not known.
        new_tokens: that will be asked for.
        raw: texts go in as they are, without the chat template.
    """

    vocabulary: int | None = None
    max_tokens: int | None = None
    new_tokens: int = 1
    raw: bool = False


def read_prompts(path: str | Path, tokenizer: Any | None, limits: Limits) -> list[Prompt]:
    """All prompts of a file, in its order. Blank lines are passed over.

    Files that end in .jsonl, .ndjson or .json hold an object a line, with `prompt` (a text, or a list of messages),
    `messages` or `prompt_ids`; other keys are ignored. In any other file each line is a text.

    Args:
        tokenizer: the model's; None: only `prompt_ids` can be used.

    Raises:
        UsageError: the file cannot be read or holds no prompt.
        DataError: lines cannot be used; names the first of them with the reason for each.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompts {path} cannot be read: {error.strerror}") from error
    is_json = path.suffix.lower() in JSON_LINES
    prompts: list[Prompt] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.rstrip(b"\r").decode()
            ids = _from_record(_object(text), tokenizer, limits) if is_json else _from_text(text, tokenizer, limits)
            check_ids(ids, limits.vocabulary)
            check_length(len(ids), limits.new_tokens, limits.max_tokens)
        except UnicodeDecodeError as error:
            bad.append((number, f"is not UTF-8 text: {error.reason}"))
        except (Unusable, UsageError) as error:
            bad.append((number, str(error)))
        else:
            prompts.append(Prompt(index=len(prompts), line=number, ids=tuple(ids)))
    if bad:
        raise _error(str(path), bad)
    if not prompts:
        raise UsageError(f"{path} holds no prompt")
    return prompts


def _error(path: str, bad: list[tuple[int, str]]) -> DataError:
    (line, why), *others = bad
    said = [why, *(f"{path}:{n}: {w}" for n, w in others[: NAMED - 1])]
    if len(bad) > NAMED:
        said.append(f"and {len(bad) - NAMED:,} more lines that cannot be used")
    return DataError("\n".join(said), path, line)


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise Unusable(f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise Unusable(f"is not an object such as {{'prompt': '...'}} but {type(found).__name__}")
    return found


def _from_record(record: Mapping[str, Any], tokenizer: Any | None, limits: Limits) -> list[int]:
    given = [key for key in KEYS if key in record]
    if len(given) != 1:
        has = ", ".join(map(repr, given or record)) or "none"
        raise Unusable(f"one of the keys {', '.join(map(repr, KEYS))} is needed; it has {has}")
    value = record[given[0]]
    if given[0] == "prompt_ids":
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise Unusable("'prompt_ids' is not a list of whole numbers")
        return value
    if given[0] == "prompt" and isinstance(value, str):
        return _from_text(value, tokenizer, limits)
    messages = check_messages(value, given[0], needs_answer=False)
    if not getattr(tokenizer, "chat_template", None):
        raise Unusable("has messages, but the model has no chat template; give a text as 'prompt'")
    if limits.raw:
        raise Unusable("has messages, which need the chat template that raw leaves out")
    try:
        found = tokenizer.apply_chat_template(  # type: ignore[union-attr]
            messages, tools=record.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise Unusable(f"the chat template refuses it: {error}") from None
    return list(found["input_ids"])


def _from_text(text: str, tokenizer: Any | None, limits: Limits) -> list[int]:
    if tokenizer is None:
        raise Unusable("is a text, but the model has no tokenizer; give 'prompt_ids'")
    return encode(tokenizer, text, raw=limits.raw)
