"""A ratchet: the names that users may rely on. Adding one is a decision; removing one breaks somebody."""

import pytest

import offload

NAMES = {
    "__version__",
    "finetuning",
    "load",
    "pack",
    "probe",
    "wrap",
    "BudgetError",
    "CheckpointError",
    "ClosedError",
    "DataError",
    "FormatError",
    "ModelError",
    "OffloadError",
    "PickleError",
    "StorageError",
    "StrictError",
    "TrainingError",
    "UsageError",
}


def test_names() -> None:
    assert set(offload.__all__) == NAMES
    assert set(dir(offload)) == NAMES
    assert len(offload.__all__) == len(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there(name: str) -> None:
    assert getattr(offload, name) is getattr(offload, name)


def test_errors_are_one_tree() -> None:
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(offload, name), offload.OffloadError)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lode'.*finetuning, load, pack, probe, wrap"):
        _ = offload.lode
