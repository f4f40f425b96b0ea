"""What a commit of training state is: the manifest that says which slot of every shard belongs to which step.

The manifest is one small JSON file under the digest of its text, replaced as a whole. Whoever holds the newest manifest
that is intact holds a consistent state, because no slot that it names is written to before the next one is durable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError, StorageError
from offload.tiers.durable import write_durably

MANIFEST = "state.json"
VERSION = 1
_LIMIT_NBYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One committed step.

    Attributes:
        step: optimizer steps that the state holds.
        shards: shard name -> (slot, checksum of its bytes).
        identity: what the state belongs to; a run with another one cannot go on from it.
        extra: what the caller stores with it.
    """

    step: int
    shards: Mapping[str, tuple[int, str]]
    identity: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def write_commit(folder: Path, commit: Commit) -> None:
    """Makes this the commit that a later run finds. Raises StorageError, see `write_durably`."""
    text = json.dumps(
        {
            "version": VERSION,
            "step": commit.step,
            "identity": commit.identity,
            "extra": commit.extra,
            "shards": {name: [slot, checksum] for name, (slot, checksum) in commit.shards.items()},
        },
        allow_nan=False,
    ).encode()
    write_durably(folder / MANIFEST, hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def read_commit(folder: Path) -> Commit | None:
    """The last commit in a folder; None when there is none.

    Raises:
        CheckpointError: the manifest is damaged or of another version.
        StorageError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT_NBYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", path=str(path), errno=error.errno) from error
    head, _, text = data.partition(b"\n")
    if len(data) > _LIMIT_NBYTES or head != hashlib.sha256(text).hexdigest().encode():
        raise CheckpointError(f"{path} is damaged: its text and its digest differ. Restore the folder from a copy")
    found = json.loads(text)
    if found["version"] != VERSION:
        raise CheckpointError(f"{path} is of version {found['version']}; this release reads version {VERSION}")
    shards = {name: (int(slot), str(checksum)) for name, (slot, checksum) in found["shards"].items()}
    return Commit(step=found["step"], shards=shards, identity=found["identity"], extra=found["extra"])
