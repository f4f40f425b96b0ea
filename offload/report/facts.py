"""The facts of a run as rows of tables: what it was given, what it did, what held it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offload.report.recorded import number
from offload.units import format_bytes, format_count, format_rate, format_seconds

Rows = list[tuple[str, str]]


def asked(run: Mapping[str, Any]) -> Rows:
    """Model, machine and budgets."""
    found: Rows = [("model", str(run.get("model")))]
    _add(found, "parameters", number(run, "params"), lambda v: format_count(int(v)))
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
    """Rates, waits and where the prediction came from."""
    rows: Rows = []
    _add(rows, "ready after", number(run, "ready_s"), format_seconds)
    _add(rows, "disk, measured", number(run, "disk_bytes_per_s"), format_rate)
    _add(rows, "link", number(run, "link_bytes_per_s"), format_rate)
    for cause in _mapping(run.get("stalls")):
        label = str(cause).removeprefix("compute:")
        _add(rows, f"a step waits for {label}", number(run, "stalls", cause), format_seconds)
    expected = _mapping(run.get("predicted"))
    if expected:
        runs = number(expected, "calibrated_runs")
        learnt = f", calibrated by {runs:.0f} runs" if runs else ""
        rows.append(("prediction", f"{expected.get('origin')}, for {expected.get('hardware')}{learnt}"))
    return rows


def kernels(run: Mapping[str, Any]) -> Rows:
    """Each op, and who computed it and why."""
    return [(str(op), str(by)) for op, by in _mapping(run.get("kernels")).items()]


def said(run: Mapping[str, Any]) -> str:
    """The run in a line."""
    parts = [str(run.get("model"))]
    if (params := number(run, "params")) is not None:
        parts.append(f"{format_count(int(params))} parameters")
    if run.get("device") is not None:
        parts.append(f"on {run['device']}")
    if (batch := number(run, "batch")) is not None:
        parts.append(f"{batch:.0f} sequence{'s' if batch != 1 else ''} at a time")
    return ", ".join(parts)


def tiles(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, remark): what a reader wants to know first."""
    rows: list[tuple[str, str, str]] = []
    _tile(rows, "tokens per second", number(run, "tokens_per_s"), lambda v: f"{v:.2f}", _expected(run, "tokens_per_s"))
    step = number(run, "decode_s_per_token")
    _tile(rows, "a step takes", step, format_seconds, _expected(run, "decode_s_per_token"))
    _tile(rows, "first token after", number(run, "prefill_s"), format_seconds, _expected(run, "prefill_s"))
    bound = number(run, "bound_s_per_token")
    binding = _mapping(run.get("bound")).get("binding")
    remark = f"{format_seconds(bound)} by {binding}" if bound else ""
    _tile(rows, "of the bound reached", number(run, "fraction_of_bound"), lambda v: f"{v:.0%}", remark)
    for key, measured, label in (
        ("cpu_memory", "peak_rss_bytes", "peak memory"),
        ("gpu_memory", "device_peak_bytes", "peak of the device"),
    ):
        budget = number(run, "budgets", key)
        remark = f"budget {format_bytes(budget)}" if budget else ""
        _tile(rows, label, number(run, measured) or None, format_bytes, remark)
    return rows


def notes(run: Mapping[str, Any]) -> list[str]:
    """What did not go the fast way."""
    fallbacks = run.get("fallbacks")
    return [str(f) for f in fallbacks] if isinstance(fallbacks, list) else []


NAMES = {
    "prefill_s": "first token",
    "decode_s_per_token": "a step",
    "tokens_per_s": "tokens/s",
    "peak_rss_bytes": "peak memory",
    "device_peak_bytes": "peak of the device",
    "read_bytes_per_token": "read a step",
    "upload_bytes_per_token": "uploaded a step",
    "bound_s_per_token": "bound of a step",
}


def compared(run: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, predicted, measured, predicted over measured minus 1), for all that was predicted."""
    rows = []
    for name, label in NAMES.items():
        expected, measured = number(run, "predicted", name), number(run, name)
        if expected is None or not (expected or measured):
            continue
        error = f"{expected / measured - 1:+.1%}" if measured else ""
        rows.append((label, _unit(name, expected), "" if measured is None else _unit(name, measured), error))
    return rows


def _expected(run: Mapping[str, Any], name: str) -> str:
    expected = number(run, "predicted", name)
    return f"predicted {_unit(name, expected)}" if expected is not None else ""


def _tile(
    rows: list[tuple[str, str, str]], label: str, value: float | None, show: Callable[[float], str], remark: str
) -> None:
    if value is not None:
        rows.append((label, show(value), remark))


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
