"""What runs teach: factors shrunk toward 1, bounded, the same after the same runs, kept apart, removable."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import UsageError
from offload.hardware import fingerprint, versions
from offload.profile import Learned, Profile, forget, learn, load_profile, preset, save_profile
from offload.profile.learned import BOUND, FAR, parse_learned

RESIDUALS = st.lists(st.floats(-2.9, 2.9), min_size=1, max_size=60)


def after(values: list[float], family: str = "read") -> Learned:
    learned = Learned()
    for value in values:
        learned = learned.with_run({family: value})
    return learned


@given(RESIDUALS)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_factor_lies_between_1_and_what_was_seen(values: list[float]) -> None:
    factor = after(values).factor("read")
    assert 1 / BOUND <= factor <= BOUND
    if all(v > 0 for v in values):
        assert 1 <= factor <= math.exp(max(values)) + 1e-9
    if all(v < 0 for v in values):
        assert math.exp(min(values)) - 1e-9 <= factor <= 1


def test_more_runs_count_for_more_and_noisy_ones_for_less() -> None:
    factors = [after([0.1] * n).factor("read") for n in (1, 2, 5, 30)]
    assert factors == sorted(factors)
    assert math.isclose(factors[-1], math.exp(0.1), rel_tol=5e-3)
    assert after([0.1, 0.1, 0.1]).factor("read") > after([0.5, -0.3, 0.1]).factor("read") > 1
    assert Learned().factor("read") == 1
    assert after([0.1]).factor("upload") == 1, "one family teaches nothing of another"


def test_a_run_in_a_slow_spell_teaches_little() -> None:
    """One run that was far off, alone or after others that were not; many that agree are believed all the same."""
    assert after([1.0]).factor("read") == after([FAR]).factor("read") < 1.25
    assert after([0.0] * 5 + [1.0]).factor("read") < 1.07
    assert after([0.6] * 40).factor("read") > 1.75
    assert after([1.0], "decode").families["decode"].mean == 1.0, "what an interval rests on is told as it was"


def test_an_interval_narrows_with_good_predictions_and_widens_with_bad_ones() -> None:
    before = Learned().deviation("decode")
    assert after([0.01] * 20, "decode").deviation("decode") < before < after([0.3] * 20, "decode").deviation("decode")


def test_nonsense_is_left_out_and_old_runs_are_forgotten() -> None:
    learned = after([0.1]).with_run({"read": math.nan, "upload": math.inf, "decode": 5.0})
    assert learned == after([0.1])
    assert after([0.5] * 200 + [0.0] * 200).factor("read") < 1.02
    assert after([0.5] * 200).runs == 40


@given(RESIDUALS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_it_survives_its_file(values: list[float]) -> None:
    learned = after(values).with_run({"compute.few": values[0]})
    assert parse_learned(learned.dump()) == learned


@pytest.mark.parametrize(
    "text",
    ["[families", "[families]\nread = 1", "[families]\nread = [1, 2]", "[families]\nread = [1, nan, 0]", "x = 1"],
)
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_learned(text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    base = preset("cpu-ddr5-nvme4")
    installed = {name: version or "none" for name, version in versions().items()}
    return Profile(
        **{f: getattr(base, f) for f in ("name", "tiers", "lanes", "processors")},
        source="measured",
        fingerprint=fingerprint(),
        versions=installed,
    )


def test_it_is_kept_beside_the_profile(here: Profile, tmp_path: Path) -> None:
    assert not learn(None, {"read": 0.2}), "a machine that was not measured"
    save_profile(here)
    assert learn(None, {"read": 0.2})
    assert learn(tmp_path / "model", {"read": 0.2}), "a model without a profile of its own uses the machine's"
    found = load_profile()
    assert found is not None
    assert found.learned == after([0.2, 0.2])
    assert forget() == 1
    assert forget() == 0
    assert load_profile() == here


def test_measuring_again_forgets(here: Profile) -> None:
    save_profile(here)
    learn(None, {"read": 0.2})
    save_profile(here)
    assert load_profile() == here


def test_a_damaged_file_teaches_nothing(here: Profile, tmp_path: Path) -> None:
    save_profile(here)
    learn(None, {"read": 0.2})
    (file,) = tmp_path.rglob("*.residuals.toml")
    file.write_text("[families")
    assert load_profile() == here
    assert learn(None, {"read": 0.2})
    assert load_profile() != here
