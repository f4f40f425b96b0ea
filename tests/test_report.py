"""`offload report`: one page from what a run left behind, whole and safe whatever the files hold."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.errors import UsageError
from offload.report import page, read_run, read_trace
from offload.report.gantt import gantt, windows
from offload.report.links import rates
from offload.report.recorded import Trace
from offload.report.recorded import trace as trace_of
from offload.report.roofline import points, roof, summary
from offload.report.svg import NARROW, WIDE, escape, ticks
from offload.runtime.timeline import Mark, Span, Timeline

RUN: dict[str, Any] = {
    "model": "a/model",
    "params": 1_000_000,
    "checkpoint_bytes": 2_000_000,
    "budgets": {"cpu_memory": 4 << 30, "gpu_memory": 1 << 30, "sources": {"cpu_memory": "as asked"}},
    "device": "emulated",
    "batch": 2,
    "prefill_s": 0.5,
    "decode_s_per_token": 0.2,
    "tokens_per_s": 10.0,
    "read_bytes_per_token": 1000,
    "bound_s_per_token": 0.15,
    "bound": {"disk_s": 0.15, "link_s": 0.05, "compute_s": 0.1, "binding": "disk"},
    "fraction_of_bound": 0.75,
    "stalls": {"compute:read": 0.07, "compute:upload": 0.01},
    "peak_rss_bytes": 3 << 30,
    "device_peak_bytes": 1 << 29,
    "disk_bytes_per_s": 3e9,
    "link_bytes_per_s": 8e9,
    "fallbacks": ["no huge pages here"],
    "kernels": {"linear": "cpu: measured faster"},
    "versions": {"torch": "2.13", "triton": None},
    "predicted": {
        "prefill_s": 0.4, "decode_s_per_token": 0.19, "tokens_per_s": 10.5, "peak_rss_bytes": 3 << 30,
        "binding": "disk", "interval": [0.17, 0.21], "origin": "measured", "hardware": "this machine",
    },
    "roofline": {
        "processor": "cpu", "measured": True, "flops_per_s": 1e12, "bytes_per_s": 5e10,
        "units": [
            {"name": f"model.layers.{k}"}
            | {"prefill": {"flops": 8e10, "bytes": 1e9}, "decode": {"flops": 1e9, "bytes": 1e9}}
            for k in range(2)
        ],
    },
}  # fmt: skip


def recorded() -> Timeline:
    """Three tokens: reads that overlap, uploads, computing, and waits for both."""
    timeline = Timeline()
    for step in range(3):
        at = 100.0 + step
        for k in range(2):
            timeline.add("read", f"model.layers.{k}", at + 0.1 * k, at + 0.5, 1 << 28)
            timeline.add("upload", f"model.layers.{k}", at + 0.5 + 0.1 * k, at + 0.6 + 0.1 * k, 1 << 28)
            timeline.add("compute", f"model.layers.{k}", at + 0.7 + 0.1 * k, at + 0.8 + 0.1 * k, 1 << 28)
        timeline.stall("compute:read", "model.layers.0", at, at + 0.5)
        timeline.stall("compute:upload", "model.layers.0", at + 0.5, at + 0.7)
    for k, name in enumerate(("start", "token 1", "token 2", "token 3")):
        timeline.marks.append(Mark(name, 100.0 + k, {"cpu_memory": (2 << 30) + k, "gpu_memory": 1 << 28}))
    return timeline


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """What a run leaves: its object and its trace."""
    run, trace = tmp_path / "run.json", tmp_path / "trace.json"
    run.write_text(json.dumps(RUN))
    recorded().write_chrome_trace(trace)
    return run, trace


class Balance(HTMLParser):
    """Collects tags and visible text; fails where an end tag does not close what was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def parsed(text: str) -> Balance:
    found = Balance()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_the_page_is_whole_and_asks_nobody(files: tuple[Path, Path]) -> None:
    text = page(read_run(str(files[0])), read_trace(str(files[1])))
    found = parsed(text)
    assert not re.search(r"http[s]?:|url\(|@import|//", text)
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in found.tags}
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {n for n in names if n.startswith("on") or n in ("src", "href", "style")}
    assert text.count('<svg class="wide"') == text.count('<svg class="narrow"') == 9
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_every_lane_every_wait_and_the_facts_are_there(files: tuple[Path, Path]) -> None:
    found = parsed(page(read_run(str(files[0])), read_trace(str(files[1]))))
    kinds = [attributes.get("class") for tag, attributes in found.tags if tag == "rect"]
    assert kinds.count("span stall") == 2 * (6 + 2)  # 2 in each of 3 steps, and the 2 of the bars; wide and narrow
    assert kinds.count("shade") == 2 * 6
    for lane in ("read", "upload", "compute"):
        assert kinds.count(f"span {lane}") == 2 * (6 + 1)
    words = "\n".join(found.words)
    for said in (
        "waits: read", "waits: upload", "First pass", "Last 2 steps", "Main memory", "Device memory", "budget",
        "Read from disk: ", "Uploaded to the device", "predicted", "measured",
        "0.15 s by disk", "75%", "4.00 GiB",
        "+5.0%", "-20.0%", "no huge pages here", "as asked", "measured, for this machine", "torch 2.13",
    ):  # fmt: skip
        assert said in words, said
    assert "triton" not in words


def test_the_same_files_give_the_same_page(files: tuple[Path, Path]) -> None:
    run, trace = read_run(str(files[0])), read_trace(str(files[1]))
    assert page(run, trace) == page(copy.deepcopy(run), read_trace(str(files[1])))


def test_text_is_escaped_everywhere() -> None:
    evil = "</title></style></svg><script>alert('\"')</script>&\x00\ud800"

    def spoil(value: Any, keys: bool = True) -> Any:
        if isinstance(value, dict):
            return {(f"{evil}{k}" if keys else k): spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return f"{value}{evil}" if isinstance(value, str) else value

    run = {k: spoil(v, keys=k not in ("budgets", "bound", "predicted")) for k, v in RUN.items()}
    spans = tuple(s._replace(lane=spoil(s.lane), name=spoil(s.name)) for s in recorded().spans)
    stalls = tuple(s._replace(name=spoil(s.name)) for s in recorded().spans if s.lane == "stall")
    text = page(run, Trace(spans=spans + stalls, marks=(Mark("start", 100.0, {}), Mark(evil, 103.0, {evil: 1}))))
    found = parsed(text)
    assert "script" not in {tag for tag, _ in found.tags}
    assert "\x00" not in text
    text.encode()


def test_a_page_without_a_trace_says_so() -> None:
    found = parsed(page(RUN))
    assert any("No trace was given" in words for words in found.words)
    assert not any("Read from disk" in words for words in found.words)


@pytest.mark.parametrize("value", [None, "x", [], {}, True, float("nan"), float("inf"), -1.0, 0])
@pytest.mark.parametrize("name", sorted(set(RUN) - {"model"}))
def test_any_field_may_be_missing_or_strange(name: str, value: Any) -> None:
    parsed(page(RUN | {name: value}, trace_of([])))


def test_a_trace_without_marks_is_one_picture() -> None:
    spans = tuple(s._replace(start=s.start - 100, end=s.end - 100) for s in recorded().spans)
    trace = Trace(spans=spans)
    assert windows(trace) == [("All that the trace holds", 0.0, pytest.approx(2.9))]
    parsed(page(RUN, trace))


def test_the_last_generation_counts() -> None:
    def at(name: str, time: float) -> dict[str, Any]:
        return {"ph": "i", "name": name, "ts": time * 1e6}

    span = {"ph": "X", "cat": "read", "name": "u", "dur": 1e6, "args": {"bytes": 5}}
    found = trace_of([span | {"ts": 0}, span | {"ts": 11e6}, at("start", 0), at("token 1", 1), at("start", 10)])
    assert [m.name for m in found.marks] == ["start"]
    assert found.spans == (Span("read", "u", 1.0, 2.0, 5),)


def test_a_long_trace_is_drawn_in_part_and_waits_first() -> None:
    drawn = WIDE.spans
    spans = [Span("compute", f"u{k}", k, k + 1.0, 0) for k in range(drawn + 10)]
    spans.append(Span("stall", "compute:read u1", 1.0, 1.001, 0))
    picture, note = gantt(Trace(spans=tuple(spans)), ("All", 0.0, drawn + 10.0), WIDE)
    assert note == "the 3,000 longest of 3,011 spans are drawn"
    assert picture.count('class="span stall"') == 1
    assert picture.count('class="span compute"') == drawn - 1
    assert gantt(Trace(spans=tuple(spans)), ("All", 0.0, drawn + 10.0), NARROW)[0].count("<rect") <= NARROW.spans + 1


def test_link_use_keeps_every_byte() -> None:
    spans = [Span("read", "a", 0.05, 0.95, 900), Span("read", "b", 0.5, 0.5, 100)]
    found = rates(spans, 0.0, 1.0, bins=10)
    assert sum(found) / 10 == pytest.approx(1000)
    assert found[0] == pytest.approx(500)
    assert found[1] == pytest.approx(1000)


def test_the_roofline_says_how_far_a_block_is_from_its_ceiling(files: tuple[Path, Path]) -> None:
    run, trace = read_run(str(files[0])), read_trace(str(files[1]))
    top = roof(run)
    assert top is not None
    assert top.ridge == 20
    assert (top.at(1), top.at(80)) == (5e10, 1e12)
    found = {(p.name, p.phase): p for p in points(run, trace)}
    assert set(found) == {(f"model.layers.{k}", phase) for k in range(2) for phase in ("prefill", "decode")}
    for point in found.values():
        assert point.seconds == pytest.approx(0.1)
    assert found["model.layers.0", "decode"].bytes_per_s == pytest.approx(1e10)
    rows = summary(run, trace)
    assert [row[0] for row in rows] == ["first pass: 2 x model.layers.*", "later steps: 2 x model.layers.*"]
    assert [row[2] for row in rows] == ["80%", "20%"]
    assert "There is no roofline" in page({k: v for k, v in run.items() if k != "roofline"}, trace)


def test_ticks() -> None:
    assert ticks(1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3 << 30, 4, base=2.0) == [k << 30 for k in range(4)]
    assert ticks(0) == [0.0]


def test_escape() -> None:
    assert escape("<\"'&\x01\ud800") == "&lt;&quot;&#x27;&amp;\ufffd?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "is not what `offload run --json` prints: it has no model, budgets, prefill_s, bound"),
    ],
)
def test_a_run_that_is_none(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_run(str(path))


@pytest.mark.parametrize("event", [{}, {"ph": "X"}, {"ph": "X", "ts": "x", "dur": 1}, 5, {"ph": "C", "ts": 0}])
def test_a_trace_that_is_none(tmp_path: Path, event: Any) -> None:
    path = tmp_path / "trace.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match="is no trace"):
        read_trace(str(path))
    path.write_text(json.dumps({"traceEvents": [event]}))
    with pytest.raises(UsageError, match="does not write"):
        read_trace(str(path))


def test_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(SystemExit) as end:
        main(["report", str(files[0]), "--trace", str(files[1]), "-o", str(out)])
    assert end.value.code == 0
    assert out.read_text() == page(read_run(str(files[0])), read_trace(str(files[1])))
    assert "report.html" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["report", str(files[0]), "-o", str(tmp_path / "none" / "x.html")])
    assert end.value.code == 2
