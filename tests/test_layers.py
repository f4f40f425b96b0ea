"""The floors: a module imports only from lower ones. Every import counts, those inside functions too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    **dict.fromkeys(("units", "errors", "hardware", "profile", "specs", "messages"), 0),
    **dict.fromkeys(("io", "planner", "kernels", "lean"), 1),
    **dict.fromkeys(("tiers",), 2),
    "runtime": 3,
    **dict.fromkeys(("kv", "experts", "optim", "activations", "budgets", "processors"), 4),
    **dict.fromkeys(("generate", "finetune", "checkpoint", "handle", "doctor", "plan", "probes", "report"), 5),
    "api": 6,
    **dict.fromkeys(("bench", "commands", "cli", "options"), 7),
    "__main__": 8,
}

# Neighbours that may import each other: (who, whom). On the ground floor everything is built on units and errors.
NEIGHBOURS = {
    ("units", "errors"),
    ("hardware", "errors"),
    ("hardware", "units"),
    ("profile", "errors"),
    ("profile", "hardware"),
    ("profile", "units"),
    ("specs", "errors"),
    ("specs", "units"),
    ("probes", "checkpoint"),
    ("finetune", "checkpoint"),
    ("cli", "commands"),
    ("cli", "options"),
    ("commands", "bench"),
}

WITHOUT_TORCH = ("units", "errors", "hardware", "profile", "specs", "messages", "io", "planner")
TORCHES = {"torch", "transformers", "accelerate", "triton"}


def sources() -> dict[str, Path]:
    """Dotted module name -> file, for offload/ and for the kernels under the names they are imported by."""
    found = {}
    for top, name in (
        ("offload", "offload"),
        ("kernels/cpu", "offload.kernels.cpu"),
        ("kernels/gpu", "offload.kernels.gpu"),
    ):
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT / top).with_suffix("").parts
            found[".".join((name, *(part for part in inside if part != "__init__")))] = path
    return found


SOURCES = sources()


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that the module's text imports, import_module("...") included."""
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def part(name: str) -> str | None:
    """offload.io.buffers.Arena -> "io"; None for other libraries and for the package's own names."""
    pieces = name.split(".")
    if pieces[0] != "offload" or len(pieces) < 2 or pieces[1] == "__version__":
        return None
    return {"finetuning": "api", "load": "api", "pack": "api", "probe": "api", "wrap": "api"}.get(pieces[1], pieces[1])


PARTS = sorted(module for module in SOURCES if module != "offload")  # the package's lazy names may lead anywhere


@pytest.mark.parametrize("module", PARTS)
def test_imports_go_down(module: str) -> None:
    own = module.split(".")[1]
    assert own in FLOORS, f"give {own!r} a floor, here and in docs/architecture.md"
    wrong = []
    for line, name in imports(module):
        other = part(name)
        if other is None or other == own or (own, other) in NEIGHBOURS:
            continue
        assert other in FLOORS, f"{SOURCES[module]}:{line} imports {name}, which has no floor"
        if FLOORS[other] >= FLOORS[own]:
            wrong.append(f"line {line}: {own} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [module for module in PARTS if module.split(".")[1] in WITHOUT_TORCH])
def test_no_tensors_on_the_ground(module: str) -> None:
    wrong = [f"line {line}: {name}" for line, name in imports(module) if name.split(".")[0] in TORCHES]
    assert not wrong, f"{module} must know no tensors: {wrong}"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_the_source_folder_is_never_imported(module: str) -> None:
    wrong = [f"line {line}: {name}" for line, name in imports(module) if name.split(".")[0] == "kernels"]
    assert not wrong, f"import offload.kernels instead: {wrong}"


def test_the_reader_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import torch.nn\nfrom offload import units\nfrom .. import hardware\nfrom .buffers import Arena\n"
        "def f():\n    import numpy\n    importlib.import_module('offload.api')\n"
    )
    monkeypatch.setitem(SOURCES, "offload.io.x", path)
    assert [name for _, name in imports("offload.io.x")] == [
        "torch.nn",
        "offload.units",
        "offload.hardware",
        "offload.io.buffers.Arena",
        "numpy",
        "offload.api",
    ]
