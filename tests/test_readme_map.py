"""README.md's map is true: it lists every module, and everything that it lists is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def listed() -> list[str]:
    _, _, rest = (ROOT / "README.md").read_text().partition("\n## Map\n")
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("- `")]
    entries = [re.fullmatch(r"- `([^`]+)` — \S.*", line) for line in lines]
    assert all(entries), f"write map lines as: - `path` — one sentence; wrong: {lines[entries.index(None)]}"
    return [entry[1] for entry in entries if entry]


def holds_code(path: Path) -> bool:
    """False for an __init__.py that only says what its package is, or passes names on."""
    if path.name != "__init__.py":
        return True
    passive = (ast.Import, ast.ImportFrom, ast.Expr)
    for node in ast.parse(path.read_text()).body:
        is_all = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        if not isinstance(node, passive) and not is_all:
            return True
    return False


def modules() -> set[str]:
    found = set()
    for top in ("offload", "kernels", "benchmarks", "demo"):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT)
            if "scratch" not in inside.parts and holds_code(path):
                found.add(inside.as_posix())
    return found


def test_every_module_is_on_the_map() -> None:
    assert sorted(modules() - set(listed())) == []


def test_everything_on_the_map_is_there() -> None:
    assert [path for path in listed() if not (ROOT / path).exists()] == []


def test_nothing_is_listed_twice() -> None:
    assert len(listed()) == len(set(listed()))
