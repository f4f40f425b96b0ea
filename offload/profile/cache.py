"""Measured profiles that are kept: a file for each machine and model, valid until something that decides changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from offload.errors import UsageError
from offload.hardware import cache_dir, disk_of, fingerprint, versions
from offload.profile.learned import Learned, parse_learned
from offload.profile.looks import sharing_disk, with_looks
from offload.profile.machine import Profile
from offload.profile.rates import Look
from offload.profile.text import dump, load

_DECIDES = ("torch", "transformers", "numba", "triton")  # of what is installed: whose code is timed
NEIGHBOURS = 8  # profiles, the latest ones, whose looks at a disk are shared
RESIDUALS = ".residuals.toml"  # in place of .toml: what runs have taught, beside the profile


def load_profile(model: str | os.PathLike[str] | None = None) -> Profile | None:
    """What `offload probe` has measured here, or None where nothing that is still true is kept.

    What each of them has seen of a disk is all of theirs.

    Args:
        model: the folder of a checkpoint. Where it was not measured itself, the machine's own profile answers, or else
            the latest one of another model: op tables are scaled to other shapes.
    """
    here = fingerprint()
    own = [_path(here, model)] if model is not None else []
    others = sorted(_profiles(here), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in dict.fromkeys([*own, _path(here, None), *others]):
        if (profile := _valid(file, here)) is not None:
            beside = [found for other in others[:NEIGHBOURS] if other != file and (found := _valid(other, here))]
            profile = sharing_disk(profile, beside)
            return replace(profile, learned=_learned(file).over(_learned(_path(here, None))))
    return None


def learn(model: str | os.PathLike[str] | None, residuals: Mapping[str, float]) -> bool:
    """Remembers a run's residuals beside the profile that predicted it; False where the machine was not measured.

    They are remembered for the machine in general, too: for models that have not run here yet.

    Args:
        model: as for `load_profile`.
        residuals: family -> logarithm of measured over predicted; see `Learned`.
    """
    here = fingerprint()
    own, general = _path(here, model), _path(here, None)
    known = [file for file in dict.fromkeys([own, general]) if _valid(file, here) is not None]
    for file in dict.fromkeys([*known[:1], general]) if known else ():
        _write(file.with_suffix(RESIDUALS), _learned(file).with_run(residuals).dump())
    return bool(known)


def remember_disk(model: str | os.PathLike[str] | None, looks: Sequence[Look]) -> None:
    """Adds looks at the disk to a profile that was measured for this very model (or, with None, without one)."""
    here = fingerprint()
    file = _path(here, model)
    if (profile := _valid(file, here)) is not None:
        _write(file, dump(with_looks(profile, looks)))


def forget(model: str | os.PathLike[str] | None = None) -> int:
    """Removes what runs have taught: of one model, or of all on this machine; returns how many files that were."""
    here = fingerprint()
    files = [_path(here, model).with_suffix(RESIDUALS)] if model is not None else _folder().glob(f"{here}-*{RESIDUALS}")
    found = [file for file in files if file.is_file()]
    for file in found:
        file.unlink()
    return len(found)


def own_profile(model: str | os.PathLike[str] | None) -> Profile | None:
    """As `load_profile`, but only what was measured for this very model (or, with None, without one)."""
    here = fingerprint()
    return _valid(_path(here, model), here)


def _profiles(here: str) -> list[Path]:
    return [file for file in _folder().glob(f"{here}-*.toml") if not file.name.endswith(RESIDUALS)]


def _learned(profile: Path) -> Learned:
    file = profile.with_suffix(RESIDUALS)
    try:
        return parse_learned(file.read_text()) if file.is_file() else Learned()
    except (OSError, UnicodeDecodeError, UsageError):  # damaged: nothing is known, and the next run writes it anew
        return Learned()


def save_profile(profile: Profile, model: str | os.PathLike[str] | None = None) -> Path:
    """Keeps a profile for `load_profile`; returns its file. The file is whole or not there.

    What runs have taught belonged to the one before it, and is forgotten.
    """
    file = _path(profile.fingerprint, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(RESIDUALS).unlink(missing_ok=True)
    _write(file, dump(profile))
    return file


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _folder() -> Path:
    return cache_dir() / "profiles"


def _path(here: str, model: str | os.PathLike[str] | None) -> Path:
    """The file: a model is its configuration, whether it is packed, and the disk that it lies on."""
    if model is None:
        return _folder() / f"{here}-machine.toml"
    folder = Path(model)
    digest = hashlib.sha256(disk_of(folder).device.encode())
    for name in ("config.json", "offload.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return _folder() / f"{here}-{digest.hexdigest()[:12]}.toml"


def _valid(file: Path, here: str) -> Profile | None:
    if not file.is_file():
        return None
    try:
        profile = load(file)
    except UsageError:  # of another schema, or damaged: as good as none, and the next probe writes it anew
        return None
    now = versions()
    is_same = all(profile.versions.get(name) == (now[name] or "none") for name in _DECIDES)
    return profile if profile.fingerprint == here and is_same else None
