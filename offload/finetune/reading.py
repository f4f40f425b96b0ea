"""From a YAML file and key=value overrides to a checked Config, with errors that name the key to write."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import yaml

from offload.errors import UsageError
from offload.finetune.config import Config, Section

ELSEWHERE = {
    "base_model": "model", "model_name_or_path": "model", "finetuning_type": "method", "adapter": "method",
    "dataset": "data.train", "datasets": "data.train", "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length", "cutoff_len": "data.max_length", "sample_packing": "data.packing",
    "micro_batch_size": "train.per_device_train_batch_size", "batch_size": "train.per_device_train_batch_size",
    "num_epochs": "train.num_train_epochs", "epochs": "train.num_train_epochs", "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type", "optimizer": "train.optim", "warmup_ratio": "train.warmup_steps",
    "max_memory": "budgets.cpu_memory", "offload_folder": "budgets.offload_dir", "lora_r": "lora.r",
    "lora_rank": "lora.r", "lora_target": "lora.target_modules",
}  # fmt: skip
"""Keys of other tools (TRL, Axolotl, LLaMA-Factory, accelerate), for the hint in an error."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a file, with overrides such as "train.learning_rate=2e-5" laid over it.

    Raises:
        UsageError: the file cannot be read, a key is not known, or a value is out of range.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold keys and values such as model: path, but holds {type(values).__name__}")
    for override in overrides:
        _lay_over(values, override)
    return make_config(values, str(path))


def make_config(values: dict[str, Any], where: str = "configuration") -> Config:
    """The same from a nested dictionary.

    Raises:
        UsageError: see read_config; the message begins with `where`.
    """
    for key in _keys(values, Config, ()):
        check_key(key, where)
    try:
        return msgspec.convert(values, Config, strict=False)  # YAML reads 1e-5 as a text, which strict would refuse
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}: {_plain(str(error))}") from None


def known_keys(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key that may be written, dotted, in order, with its default (msgspec.NODEFAULT where it must be given)."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(section):
        name = prefix + field.encode_name
        if isinstance(field.type, type) and issubclass(field.type, Section):
            found |= known_keys(field.type, name + ".")
        else:
            found[name] = field.default
    return found


def _lay_over(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override; write it like train.learning_rate=2e-5")
    check_key(key, "override")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"override {override!r}: the value is not YAML; put it in quotes") from None
    *sections, last = key.split(".")
    at: Any = values
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise UsageError(f"override {override!r}: {section} holds {at!r} in the file, not keys and values")
    at[last] = value


def _keys(values: dict[Any, Any], section: type[Section], prefix: tuple[str, ...]) -> Iterator[str]:
    inner = {f.encode_name: f.type for f in msgspec.structs.fields(section)}
    for key, value in values.items():
        path = (*prefix, str(key))
        kind = inner.get(key)
        if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Section):
            yield from _keys(value, kind, path)
        else:
            yield ".".join(path)


def check_key(key: str, where: str) -> None:
    known = list(known_keys())
    sections = {k.partition(".")[0] for k in known if "." in k}
    if key in known or key in sections:
        return
    last = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    near = same or [v for k, v in ELSEWHERE.items() if k == last] or difflib.get_close_matches(key, known, 1, 0.6)
    if not near:  # the wrong section and misspelt
        ends = {k.rpartition(".")[2]: k for k in known}
        near = [ends[e] for e in difflib.get_close_matches(last, ends, 1, 0.6)]
    section = key.partition(".")[0]
    inside = [k for k in known if k.startswith(f"{section}.")] or [k for k in known if "." not in k] + sorted(sections)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(inside)}"
    raise UsageError(f"{where}: {key} is not known; {hint}")


def check_value(name: str, value: Any, kind: Any) -> None:
    """Whether a value is of a kind, as fields of the configuration have one.

    Raises:
        UsageError: it is not; says what `name` may be.
    """
    try:
        msgspec.convert(value.item() if hasattr(value, "item") else value, kind)  # a number of numpy is one
    except msgspec.ValidationError as error:
        raise UsageError(_said(name, f"{name}={value!r}", str(error).partition(" - at ")[0], kind)) from None


def _kind(key: str) -> Any:
    """Of a dotted key; None where there is none."""
    kind: Any = Config
    for part in key.split("."):
        kind = next((f.type for f in msgspec.structs.fields(kind) if f.encode_name == part), None)
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            break
    return kind


def _words(kind: Any) -> tuple[str, ...]:
    """Those of a kind that is one of a few words, or a number instead."""
    parts = [a for part in get_args(kind) for a in (get_args(part) or (part,))]
    return tuple(a for a in parts if isinstance(a, str)) + ("a number",) * (float in parts or int in parts)


def _plain(message: str) -> str:
    """msgspec's message with the key in front: "train.max_steps: expected int, got str"."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", message, re.DOTALL)
    text, key = (found[1], found[2]) if found else (message, "")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return f"{key + '.' if key else ''}{missing[1]} is missing"
    return _said(key, key, text, _kind(key))


def _said(name: str, place: str, text: str, kind: Any) -> str:
    """One sentence of msgspec about a value; of a word that is not known, with the words that are.

    Args:
        place: how to name what it is about, where the sentence does not have the value.
    """
    text, words = text.replace("`", ""), _words(kind)
    if words and (unknown := re.fullmatch("Invalid enum value (.*)", text)):
        near = difflib.get_close_matches(unknown[1].strip("'"), words, 1, 0.5)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        return f"{name}={unknown[1]} is not known; {hint} {', '.join(words)}"
    return f"{place}: {text[0].lower() + text[1:]}" if place else text
