"""A disk's rate from looks at different times, shared by the profiles of one machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offload.hardware import fingerprint, versions
from offload.profile import (
    Lane,
    Look,
    Profile,
    dump,
    load_profile,
    own_profile,
    parse,
    preset,
    remember_disk,
    save_profile,
    together,
)
from offload.profile.looks import HALF_S, MOST, sharing_disk, with_looks

BASE = preset("cpu-ddr5-nvme4")


def seen(name: str, *looks: tuple[float, float], disk: str = "ext4 on /dev/x") -> Profile:
    lane = replace(BASE.lanes["read"], looks=tuple(Look(*look) for look in looks))
    return replace(BASE, name=name, source="measured", lanes={**BASE.lanes, "read": lane}, versions={"disk": disk})


def test_the_middle_of_looks_and_how_far_they_lie_from_it() -> None:
    rate, spread = together([Look(k, r) for k, r in enumerate((1e9, 3e9, 3.3e9, 2.7e9, 9e9))])
    assert rate == 3e9
    assert spread == pytest.approx(0.1)
    assert together([Look(0, 2e9), Look(0, 3e9)]) == (2.5e9, 0.0), "two looks tell of no spread"


def test_recent_looks_weigh_more() -> None:
    old = [Look(0, 4e9), Look(1, 4e9), Look(2, 4e9)]
    assert together([*old, Look(3, 2e9), Look(4, 2e9)])[0] == 4e9
    later = 3 * HALF_S
    assert together([*old, Look(later, 2e9), Look(later, 2e9)])[0] == 2e9


def test_profiles_of_one_disk_share_its_rate_and_others_do_not() -> None:
    slow, fast = seen("slow", (10, 2e9), (10, 2.2e9)), seen("fast", (20, 3e9), (21, 3.1e9), (22, 3.2e9))
    lane = sharing_disk(slow, [fast]).lanes["read"]
    assert lane.bytes_per_s == 3e9
    assert lane.best / slow.lanes["read"].best == pytest.approx(3e9 / slow.lanes["read"].bytes_per_s)
    assert all(r.spread >= 0.06 for r in lane.rates)
    assert lane.looks == slow.lanes["read"].looks, "what a profile has seen itself stays apart"
    other = seen("other", (20, 9e9), disk="ext4 on /dev/y")
    assert sharing_disk(slow, [other]).lanes["read"].bytes_per_s == pytest.approx(2.1e9)


def test_a_profile_without_looks_has_one() -> None:
    old = replace(seen("old"), date="2026-11-01T00:00:00+00:00")
    lane = sharing_disk(old, []).lanes["read"]
    assert lane.bytes_per_s == pytest.approx(old.lanes["read"].bytes_per_s)
    assert sharing_disk(replace(old, date=""), []) == replace(old, date="")


def test_looks_are_kept_in_the_file_and_only_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    installed = {name: version or "none" for name, version in versions().items()}
    profile = replace(seen("here", (1, 2e9)), fingerprint=fingerprint())
    profile = replace(profile, versions={**profile.versions, **installed})
    assert parse(dump(profile)).lanes["read"] == profile.lanes["read"]
    save_profile(profile)
    remember_disk(None, [Look(2, 3e9), Look(3, 3e9)])
    own, shared = own_profile(None), load_profile()
    assert own is not None
    assert shared is not None
    assert [look.at for look in own.lanes["read"].looks] == [1, 2, 3]
    assert shared.lanes["read"].bytes_per_s == 3e9
    many = with_looks(profile, [Look(float(k), 1e9) for k in range(2 * MOST)])
    assert len(many.lanes["read"].looks) == MOST
    assert isinstance(many.lanes["read"], Lane)
