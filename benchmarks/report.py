"""What every benchmark reports in the same way: the machine, one JSON file, and tables in Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from runner import ROOT, run

RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "benchmarks" / "scratch"
if str(ROOT) not in sys.path:  # so that `import offload` works from a checkout that was never installed
    sys.path.insert(0, str(ROOT))

_DIRECTORIES = re.compile(r"(?<![\w.)])/(?:[\w.@+-]+/)+")


def hardware(path: Path | None = None) -> dict[str, Any]:
    """Facts about this machine, and about the disk that holds `path`; no names of hosts or folders."""
    from offload.hardware import cpu_info, disk_of, gpus, host_memory, huge_pages

    cpu, memory = cpu_info(), host_memory()
    facts: dict[str, Any] = {
        "cpu": cpu.model,
        "cores": cpu.cores,
        "ram_bytes": memory.total,
        "memory_limit_bytes": memory.limit,
        "kernel": platform.release(),
        "huge_pages": huge_pages(),
        "gpus": [{"name": g.name, "total_bytes": g.total, "pcie": f"{g.pcie_gen} x{g.pcie_width}"} for g in gpus()],
    }
    if path is not None:
        disk = disk_of(path)
        facts["disk"] = {
            "filesystem": disk.filesystem,
            "device": Path(disk.source).name,
            "model": _disk_model(disk.source),
            "rotational": disk.rotational,
            "total_bytes": disk.total,
        }
    return facts


def _disk_model(source: str) -> str | None:
    """What the disk calls itself, for /dev/NAME or a partition of it; None where the kernel does not say."""
    block = (Path("/sys/class/block") / Path(source).name).resolve()
    for folder in (block, block.parent):
        file = folder / "device" / "model"
        if file.is_file():
            return file.read_text().strip()
    return None


def machine_line(facts: dict[str, Any]) -> str:
    """The machine in one line, for above a table."""
    parts = [f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_bytes'] / 2**30:.1f} GiB RAM"]
    parts += [f"{g['name']} ({g['total_bytes'] / 2**30:.0f} GiB, PCIe {g['pcie']})" for g in facts["gpus"]]
    if disk := facts.get("disk"):
        parts.append(f"disk {disk['model'] or disk['device']} ({disk['filesystem']})")
    return "; ".join([*parts, f"Linux {facts['kernel']}"])


def checkpoint_bytes(model: Path) -> int:
    """Bytes of a checkpoint's safetensors files, headers included."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def largest_shard(model: Path) -> Path:
    """The file on which to measure the disk that a checkpoint streams from."""
    return max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)


def made_checkpoint(size: str) -> Path:
    """A random checkpoint of a named size in the scratch folder, made with the demo's script on the first call.

    Raises:
        SystemExit: the checkout has no such script.
    """

    folder, script = SCRATCH / f"random-{size}", ROOT / "demo" / "checkpoint.py"
    if (folder / "config.json").is_file():
        return folder
    if not script.is_file():
        raise SystemExit("no --model was given, and this checkout has no demo/checkpoint.py to make one with")
    SCRATCH.mkdir(exist_ok=True)
    line = run([sys.executable, str(script), str(folder), "--size", size], timeout_s=600, wants_json=False)
    if line["exit"]:
        raise SystemExit(f"demo/checkpoint.py could not make {folder.name}: {line['output']}")
    return folder


def scrub(value: Any) -> Any:
    """`value` without the folders of the absolute paths in it: results say nothing of a machine's tree."""
    if isinstance(value, str):
        return _DIRECTORIES.sub("", value)
    if isinstance(value, dict):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return value


def write(name: str, result: dict[str, Any], markdown: str, out: Path = RESULTS) -> tuple[Path, Path]:
    """Writes NAME-DATE.json and .md whole or not at all; a second run on the same day replaces the first."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{date.today().isoformat()}"
    texts = {"json": json.dumps(scrub(result), indent=1) + "\n", "md": scrub(markdown)}
    paths = []
    for suffix, text in texts.items():
        path = out / f"{stem}.{suffix}"
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)
        paths.append(path)
    return paths[0], paths[1]


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two markers of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right, padded so that the source reads well."""
    cells = [list(header), *map(list, rows)]
    widths = [max(3, *(len(row[k]) for row in cells)) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        return "| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |"

    rule = "| " + " | ".join("-" * w if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)]) + "\n"


def number(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A figure for a table, with so many significant digits; an empty cell when it is not known."""
    if value is None:
        return ""
    scaled = value / scale
    if scaled == 0:
        return "0"
    text = f"{scaled:.{digits}g}"
    return f"{scaled:.0f}" if "e" in text else text
