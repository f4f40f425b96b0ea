"""Measured profiles that are kept: a file for each machine and model, valid until something that decides changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from offload.errors import UsageError
from offload.hardware import cache_dir, disk_of, fingerprint, versions
from offload.profile.machine import Profile
from offload.profile.text import dump, load

_DECIDES = ("torch", "transformers", "numba", "triton")  # of what is installed: whose code is timed


def load_profile(model: str | os.PathLike[str] | None = None) -> Profile | None:
    """What `offload probe` has measured here, or None where nothing that is still true is kept.

    Args:
        model: the folder of a checkpoint. Where it was not measured itself, the machine's own profile answers, or else
            the latest one of another model: op tables are scaled to other shapes.
    """
    here = fingerprint()
    own = [_path(here, model)] if model is not None else []
    others = sorted(_folder().glob(f"{here}-*.toml"), key=lambda f: f.stat().st_mtime, reverse=True)
    for file in dict.fromkeys([*own, _path(here, None), *others]):
        if (profile := _valid(file, here)) is not None:
            return profile
    return None


def own_profile(model: str | os.PathLike[str] | None) -> Profile | None:
    """As `load_profile`, but only what was measured for this very model (or, with None, without one)."""
    here = fingerprint()
    return _valid(_path(here, model), here)


def save_profile(profile: Profile, model: str | os.PathLike[str] | None = None) -> Path:
    """Keeps a profile for `load_profile`; returns its file. The file is whole or not there."""
    file = _path(profile.fingerprint, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    try:
        part.write_text(dump(profile))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


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
