"""A file of prompts as token ids: JSON lines or plain text, every line checked before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
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
_SETTINGS: Mapping[str, tuple[float, Any, str]] = {  # name -> least value, types, in words
    "max_new_tokens": (1, int, "a whole number from 1"),
    "temperature": (0, (int, float), "a number from 0"),
    "top_p": (0, (int, float), "a number above 0 and up to 1"),
    "seed": (0, int, "a whole number from 0"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a line says of its answer; None: as the command line does.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token, anything above draws.
        top_p: of drawing.
        seed: of drawing; the answer depends on no other line then.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


AS_ASKED = Settings()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        index: its place among the file's prompts, from 0.
        line: its line in the file, from 1.
        ids: its tokens.
        settings: of its own.
    """

    index: int
    line: int
    ids: tuple[int, ...]
    settings: Settings = AS_ASKED

    def new_tokens(self, asked: int) -> int:
        """Of its answer, at most, where so many are asked for of those that do not say."""
        return self.settings.max_new_tokens or asked


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


def read_prompts(
    path: str | Path, tokenizer: Any | None, limits: Limits, bad: list[tuple[int, str]] | None = None
) -> list[Prompt]:
    """All prompts of a file, in its order. Blank lines are passed over.

    Files that end in .jsonl, .ndjson or .json hold an object a line, with `prompt` (a text, or a list of messages),
    `messages` or `prompt_ids`, and with settings of its own, if any: see `Settings`; other keys are ignored. In any
    other file each line is a text.

    Args:
        tokenizer: the model's; None: only `prompt_ids` can be used.
        bad: takes the lines that cannot be used, with the reason for each; None: they are an error.

    Raises:
        UsageError: the file cannot be read or holds no prompt.
        DataError: lines cannot be used; names the first of them with the reason for each.
    """
    is_refused, bad = bad is None, [] if bad is None else bad
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the prompts {path} cannot be read: {error.strerror}") from error
    is_json = path.suffix.lower() in JSON_LINES
    prompts: list[Prompt] = []
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text = line.rstrip(b"\r").decode()
            record = _object(text) if is_json else {}
            settings = _settings(record)
            ids = _from_record(record, tokenizer, limits) if is_json else _from_text(text, tokenizer, limits)
            check_ids(ids, limits.vocabulary)
            check_length(len(ids), settings.max_new_tokens or limits.new_tokens, limits.max_tokens)
        except UnicodeDecodeError as error:
            bad.append((number, f"is not UTF-8 text: {error.reason}"))
        except (Unusable, UsageError) as error:
            bad.append((number, str(error)))
        else:
            prompts.append(Prompt(index=len(prompts), line=number, ids=tuple(ids), settings=settings))
    if bad and (is_refused or not prompts):
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


def _settings(record: Mapping[str, Any]) -> Settings:
    """What a line says of its answer; null is as good as nothing."""
    given = {f.name: record[f.name] for f in fields(Settings) if record.get(f.name) is not None}
    for name, value in given.items():
        least, kinds, says = _SETTINGS[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            raise Unusable(f"'{name}' is {value!r}, and not {says}")
    if not 0 < given.get("top_p", 1.0) <= 1:
        raise Unusable(f"'top_p' is {given['top_p']!r}, and not {_SETTINGS['top_p'][2]}")
    if given.get("temperature") == 0 and "top_p" in given:
        raise Unusable("has 'top_p', but 'temperature' 0 takes the likeliest token")
    return Settings(**given)


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
