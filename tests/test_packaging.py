"""What gets installed: every package, the kernels under offload.kernels, and no top-level package named kernels."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from patience import HANGS_S

from offload.doctor import SUPPORTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "offload/__init__.py").read_text(), re.MULTILINE)[0]


def build(kind: str, tmp_path: Path) -> Path:
    """Builds a "wheel" or an "editable" wheel of a copy of the tree, offline; returns the wheel."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    out.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("offload", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def expected() -> set[str]:
    """The files that a wheel must hold."""
    own = {path.relative_to(ROOT) for path in (ROOT / "offload").rglob("*.py")}
    mapped = {Path("offload/kernels") / path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    return {str(path) for path in own | mapped}


def resolve(site: Path) -> str:
    """What an interpreter without other packages finds when only `site` is installed."""
    code = (
        "import importlib.util, site, sys\n"
        f"site.addsitedir({str(site)!r})\n"
        "import offload.kernels.cpu, offload.kernels.gpu\n"
        "assert importlib.util.find_spec('kernels') is None, 'a top-level package named kernels'\n"
        "print(offload.__version__, offload.__file__, offload.kernels.cpu.__file__)"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=site, env=clean, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for top in ("offload", "kernels") for path in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide the package that transformers looks for"


def test_wheel(tmp_path: Path) -> None:
    wheel = build("wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    code = {name for name in names if name.endswith(".py")}
    assert code == expected()
    data = {name for name in names if name.startswith("offload/") and not name.endswith(".py")}
    assert data == {str(path.relative_to(ROOT)) for path in (ROOT / "offload" / "presets").glob("*.toml")}
    assert "offload/kernels/cpu/__init__.py" in names
    assert {name.split("/")[0] for name in names} == {"offload", f"offload-{VERSION}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    site = tmp_path / "site"
    assert resolve(site) == f"{VERSION} {site}/offload/__init__.py {site}/offload/kernels/cpu/__init__.py"


def test_editable(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("editable", tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    tree = tmp_path / "tree"
    assert resolve(tmp_path / "site") == f"{VERSION} {tree}/offload/__init__.py {tree}/kernels/cpu/__init__.py"


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_doctor_knows_the_supported_versions(name: str) -> None:
    lowest, below = SUPPORTED[name]
    wanted = [*PROJECT["dependencies"], f"python{PROJECT['requires-python']}"]
    assert f"{name}>={lowest},<{below}" in wanted


def test_constraints_pin_every_dependency() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)  # and no "+local" suffix
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    asked = [*PROJECT["dependencies"], *(need for extra in PROJECT["optional-dependencies"].values() for need in extra)]
    assert {re.split(r"[<>=]", need)[0].lower().replace("_", "-") for need in asked} <= pinned
