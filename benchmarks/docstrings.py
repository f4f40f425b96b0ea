"""The documentation strings of Python's standard library: text at hand on every machine, split by module."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EVERY = 5  # one module of so many, in sorted order, is for evaluation; the others are for training
NOT_TEXT = frozenset({"idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"})  # tests, tools, tables, jokes


def text(part: str) -> str:
    """All documentation strings of a part of the library, "train" or "test".

    The same Python release gives the same text: files are parsed, never imported, in sorted order.
    """
    return "\n\n".join(doc for name in modules(part) for file in _files(name) for doc in _docs(file))


def modules(part: str) -> list[str]:
    """The modules of a part, sorted. The parts share none."""
    found = sorted(name for name in sys.stdlib_module_names if name not in NOT_TEXT and _files(name))
    return [name for k, name in enumerate(found) if (k % EVERY == EVERY - 1) == (part == "test")]


def _files(module: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    single = root / f"{module}.py"
    files = [single] if single.is_file() else sorted((root / module).rglob("*.py"))
    return [file for file in files if not NOT_TEXT & set(file.relative_to(root).parts) and "tests" not in file.parts]


def _docs(file: Path) -> Iterator[str]:
    """In the order of a walk over the file's tree; those of a few words are left out."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= 40:
                yield doc
