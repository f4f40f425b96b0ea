"""The facts of a run as rows of tables: what it was given, what it did, what held it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offload.report.recorded import number
from offload.units import format_bytes, format_rate, format_seconds

Rows = list[tuple[str, str]]


def asked(run: Mapping[str, Any]) -> Rows:
    """Model, machine and budgets."""
    found: Rows = [("model", str(run.get("model")))]
    _add(found, "parameters", number(run, "params"), lambda v: f"{v / 1e9:.2f} B")
    _add(found, "checkpoint", number(run, "checkpoint_bytes"), format_bytes)
    for key, label in (("cpu_memory", "budget, main memory"), ("gpu_memory", "budget, device")):
        source = _mapping(_mapping(run.get("budgets")).get("sources")).get(key)
        _add(found, label, number(run, "budgets", key) or None, lambda v, s=source: _with(format_bytes(v), s))
    for key in ("device", "batch", "threads", "weights"):
        if run.get(key) is not None:
            found.append((key, str(run[key])))
    _add(found, "stays in memory", number(run, "resident_bytes"), format_bytes)
    _add(found, "streams from disk", number(run, "streamed_bytes"), format_bytes)
    _add(found, "multiplied by the CPU", number(run, "cpu_bytes") or None, format_bytes)
    versions = ", ".join(f"{k} {v}" for k, v in _mapping(run.get("versions")).items() if v is not None)
    return [*found, ("versions", versions)] if versions else found


def found(run: Mapping[str, Any]) -> Rows:
    """Speed, bound and binding resource."""
    rows: Rows = []
    bound = _mapping(run.get("bound"))
    _add(rows, "tokens/s, all sequences", number(run, "tokens_per_s"), lambda v: f"{v:.2f}")
    _add(rows, "bound of a step", number(run, "bound_s_per_token") or None, format_seconds)
    if bound.get("binding") is not None and number(run, "bound_s_per_token"):
        rows.append(("binding resource", str(bound["binding"])))
    _add(rows, "of the bound reached", number(run, "fraction_of_bound"), lambda v: f"{v:.0%}")
    _add(rows, "ready after", number(run, "ready_s"), format_seconds)
    _add(rows, "disk, measured", number(run, "disk_bytes_per_s"), format_rate)
    _add(rows, "link", number(run, "link_bytes_per_s"), format_rate)
    for cause in _mapping(run.get("stalls")):
        _add(rows, f"waits a step, {cause}", number(run, "stalls", cause), format_seconds)
    expected = _mapping(run.get("predicted"))
    if expected:
        rows.append(("prediction", f"{expected.get('origin')}, for {expected.get('hardware')}"))
    kernels = ", ".join(f"{k} ({v})" for k, v in _mapping(run.get("kernels")).items())
    if kernels:
        rows.append(("kernels", kernels))
    return rows


def notes(run: Mapping[str, Any]) -> list[str]:
    """What did not go the fast way."""
    fallbacks = run.get("fallbacks")
    return [str(f) for f in fallbacks] if isinstance(fallbacks, list) else []


def compared(run: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, predicted, measured, predicted over measured minus 1), for all that was predicted."""
    rows = []
    for name in _mapping(run.get("predicted")):
        expected, measured = number(run, "predicted", name), number(run, name)
        if expected is None:
            continue
        error = f"{expected / measured - 1:+.1%}" if measured else ""
        rows.append((name, _unit(name, expected), "" if measured is None else _unit(name, measured), error))
    return rows


def _unit(name: str, value: float) -> str:
    if "bytes" in name:
        return format_bytes(value)
    return f"{value:.2f}" if name == "tokens_per_s" else format_seconds(value)


def _with(text: str, source: object) -> str:
    return f"{text} ({source})" if source else text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _add(rows: Rows, label: str, value: float | None, show: Callable[[float], str]) -> None:
    if value is not None:
        rows.append((label, show(value)))
