"""A profile as TOML: read strictly, written to be read by people.

Sizes and rates may be written as numbers or as "24GiB" and "25GB/s". Measurements are rows:

    lanes.*.looks      [seconds since 1970, bytes per second]
    lanes.*.rates      [bytes of a transfer, transfers in flight, bytes per second, relative spread]
    *.memory, copy     [threads, bytes per second, relative spread]
    ops[].curve        [rows, bytes, tokens or parameters; seconds; relative spread]
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.errors import UsageError
from offload.profile.curve import Curve
from offload.profile.fields import LONGEST, Fields, number, rate
from offload.profile.machine import OpTable, Processor, Profile, Tier
from offload.profile.rates import CopyRate, Lane, Look, MemoryRate
from offload.units import parse_bytes

SCHEMA = 1
LARGEST_FILE = 16 << 20
MOST_OF_A_CURVE = 1e15
MOST_SECONDS = 1e11  # since 1970
LOOK = ("seconds since 1970", "bytes per second")


def load(path: str | os.PathLike[str]) -> Profile:
    """A profile from a file.

    Raises:
        UsageError: it cannot be read, or something in it is wrong; says what and where.
    """
    file = Path(path)
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UsageError(f"{file} is larger than any hardware profile")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the hardware profile {file} cannot be read: {getattr(error, 'strerror', error)}") from error
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def parse(text: str) -> Profile:
    """A profile from TOML.

    Raises:
        UsageError: what is wrong, and where.
    """
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"not TOML: {error}") from None
    top = Fields(values, "")
    if (schema := top.whole("schema")) != SCHEMA:
        raise UsageError(f"schema={schema}: this version reads schema {SCHEMA}; measure again with offload probe")
    profile = Profile(
        name=top.text("name"),
        source=top.text("source", among=("measured", "estimate")),
        fingerprint=top.text("fingerprint", ""),
        date=top.text("date", ""),
        drift=top.number("drift", 0.0, 0, 10),
        noise=top.number("noise", 0.0, 0, 10),
        neighbours=top.number("neighbours", 0.0, 0, 1),
        notes=top.texts("notes"),
        versions={k: _text(v, f"versions.{k}") for k, v in top.table("versions").items()},
        costs=top.numbers("costs", lambda v, at: number(v, at, 0, LONGEST)),
        shared=top.numbers("shared", rate),
        calibration=top.numbers("calibration", lambda v, at: number(v, at, 0.1, 10)),
        interference={
            who: {o: number(v, f"interference.{who}.{o}", 0.01, 1.5) for o, v in _table(row, f"interference.{who}")}
            for who, row in top.table("interference").items()
        },
        tiers=tuple(map(_tier, top.tables("tiers"))),
        lanes={name: _lane(Fields(v, f"lanes.{name}")) for name, v in top.table("lanes").items()},
        processors={name: _processor(Fields(v, f"processors.{name}")) for name, v in top.table("processors").items()},
        ops=tuple(map(_op, top.tables("ops"))),
    )
    top.done()
    return profile


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{at}={value!r} must be a text")
    return value


def _table(value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        raise UsageError(f"{at} must be a table, not {value!r}")
    return value.items()


def _tier(fields: Fields) -> Tier:
    tier = Tier(
        name=fields.text("name"),
        capacity_nbytes=fields.nbytes("capacity"),
        processor=fields.text("processor", None),
        load=fields.text("load", None),
        store=fields.text("store", None),
    )
    fields.done()
    return tier


def _lane(fields: Fields) -> Lane:
    rows = fields.rows("rates", ("bytes", "in flight", "bytes per second", "spread"))
    rates = []
    for k, (size, threads, speed, *spread) in enumerate(rows):
        at = f"rates[{k}]"
        rates.append(
            CopyRate(
                int(number(parse_bytes(size, at), at, 1, 1e15)),
                int(number(threads, at, 1, 65536)),
                rate(speed, at),
                number(spread[0] if spread else 0.0, at, 0, 10),
            )
        )
    lane = Lane(
        rates=tuple(rates),
        sustained_bytes_per_s=fields.rate("sustained", None),
        latency_s=fields.number("latency_s", 0.0, 0, LONGEST),
        shares=fields.numbers("shares", lambda v, at: number(v, at, 0, 1000)),
        looks=tuple(
            Look(number(when, f"looks[{k}]", 0, MOST_SECONDS), rate(speed, f"looks[{k}]"))
            for k, (when, speed) in enumerate(fields.rows("looks", LOOK, 0, must=False))
        ),
    )
    fields.done()
    return lane


def _memory(rows: list[list[Any]], at: str) -> tuple[MemoryRate, ...]:
    return tuple(
        MemoryRate(
            int(number(threads, f"{at}[{k}]", 1, 65536)),
            rate(speed, f"{at}[{k}]"),
            number(spread[0] if spread else 0.0, f"{at}[{k}]", 0, 10),
        )
        for k, (threads, speed, *spread) in enumerate(rows)
    )


def _processor(fields: Fields) -> Processor:
    columns = ("threads", "bytes per second", "spread")
    processor = Processor(
        flops=fields.numbers("flops", lambda v, at: number(v, at, 1, 1e21)),
        memory=_memory(fields.rows("memory", columns), "memory"),
        copy=_memory(fields.rows("copy", columns, must=False), "copy"),
        efficiency=fields.number("efficiency", 0.8, 0.01, 1),
        launch_s=fields.number("launch_s", 0.0, 0, LONGEST),
        cores=fields.whole("cores", 1, 1, 65536),
        shares=fields.numbers("shares", lambda v, at: number(v, at, 0, 1000)),
    )
    fields.done()
    return processor


def _op(fields: Fields) -> OpTable:
    rows = fields.rows("curve", ("amount", "seconds", "spread"))
    op = OpTable(
        op=fields.text("op"),
        implementation=fields.text("implementation", among=("torch", "cpu", "gpu")),
        processor=fields.text("processor"),
        format=fields.text("format"),
        shape=fields.whole_numbers("shape"),
        over=fields.text("over", "rows", ("rows", "bytes", "tokens", "params")),
        threads=fields.whole("threads", 0, 0, 65536),
        curve=Curve.of(tuple(number(v, f"curve[{k}]", 0, MOST_OF_A_CURVE) for v in row) for k, row in enumerate(rows)),
    )
    fields.done()
    return op


def dump(profile: Profile) -> str:
    """TOML that `parse` turns into an equal profile."""
    out = [
        "# What this machine does, for offload's planner. " + profile.describe(),
        f"schema = {SCHEMA}",
        f"name = {_string(profile.name)}",
        f"source = {_string(profile.source)}",
        f"fingerprint = {_string(profile.fingerprint)}",
        f"date = {_string(profile.date)}",
        f"drift = {_number(profile.drift)}",
        f"noise = {_number(profile.noise)}",
        f"neighbours = {_number(profile.neighbours)}",
        f"notes = [{', '.join(map(_string, profile.notes))}]",
    ]
    for tier in profile.tiers:
        out += ["", "[[tiers]]", f"name = {_string(tier.name)}", f"capacity = {tier.capacity_nbytes}"]
        links = (("processor", tier.processor), ("load", tier.load), ("store", tier.store))
        out += [f"{key} = {_string(value)}" for key, value in links if value is not None]
    for name, lane in profile.lanes.items():
        out += ["", f"[lanes.{_key(name)}]"]
        copies = [(r.nbytes, r.threads, r.bytes_per_s, r.spread) for r in lane.rates]
        out += _rows("rates", "bytes of a transfer, in flight, bytes per second, spread", copies)
        if lane.sustained_bytes_per_s is not None:
            out.append(f"sustained = {_number(lane.sustained_bytes_per_s)}")
        out.append(f"latency_s = {_number(lane.latency_s)}")
        if lane.looks:
            out += _rows("looks", ", ".join(LOOK), [(look.at, look.bytes_per_s) for look in lane.looks])
        out += _inline("shares", lane.shares)
    for name, processor in profile.processors.items():
        out += ["", f"[processors.{_key(name)}]", f"cores = {processor.cores}"]
        out += [f"efficiency = {_number(processor.efficiency)}", f"launch_s = {_number(processor.launch_s)}"]
        out += _inline("flops", processor.flops) + _inline("shares", processor.shares)
        for key, rates in (("memory", processor.memory), ("copy", processor.copy)):
            if rates:
                rows = [(r.threads, r.bytes_per_s, r.spread) for r in rates]
                out += _rows(key, "threads, bytes per second, spread", rows)
    for who, row in profile.interference.items():
        out += ["", f"[interference.{_key(who)}]  # the part of its speed that {who} keeps while another runs"]
        out += [f"{_key(other)} = {_number(kept)}" for other, kept in row.items()]
    named = ("costs", profile.costs), ("shared", profile.shared), ("calibration", profile.calibration)
    for title, values in named:
        if values:
            out += ["", f"[{title}]", *(f"{_key(k)} = {_number(v)}" for k, v in values.items())]
    if profile.versions:
        out += ["", "[versions]", *(f"{_key(k)} = {_string(v)}" for k, v in profile.versions.items())]
    for op in profile.ops:
        out += ["", "[[ops]]", f"op = {_string(op.op)}", f"implementation = {_string(op.implementation)}"]
        out += [f"processor = {_string(op.processor)}", f"format = {_string(op.format)}"]
        out += [f"shape = [{', '.join(map(str, op.shape))}]", f"over = {_string(op.over)}", f"threads = {op.threads}"]
        out += _rows("curve", f"{op.over}, seconds, spread", [(a.x, a.seconds, a.spread) for a in op.curve.anchors])
    return "\n".join(out) + "\n"


def _rows(key: str, columns: str, rows: Sequence[tuple[float, ...]]) -> list[str]:
    lines = [f"    [{', '.join(map(_number, row))}]," for row in rows]
    return [f"{key} = [  # {columns}", *lines, "]"]


def _inline(key: str, values: Any) -> list[str]:
    inside = ", ".join(f"{_key(k)} = {_number(v)}" for k, v in values.items())
    return [f"{key} = {{ {inside} }}"] if values else []


def _number(value: float) -> str:
    return (
        str(value)
        if isinstance(value, int)
        else str(int(value))
        if value.is_integer() and abs(value) < 1e15
        else repr(value)
    )


def _key(text: str) -> str:
    return text if text and all(c.isascii() and (c.isalnum() or c in "_-") for c in text) else _string(text)


def _string(text: str) -> str:
    escaped = "".join(
        {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(c)
        or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c)
        for c in text
    )
    return f'"{escaped}"'
