"""The quality benchmark: what its text is made of, and what its table says of equal and of changed weights."""

from typing import Any

import pytest
from docstrings import _docs, modules
from quality import change, quality_table


def line(name: str, nll: list[float], error: float, equal: bool) -> dict[str, Any]:
    return {
        "format": name,
        "bits": 16,
        "nll": nll,
        "kl": [0.0, 0.0],
        "top1": 1.0,
        "equal": equal,
        "errors": {"0.q": error},
    }


def test_the_parts_of_the_text_share_no_module() -> None:
    train, test = modules("train"), modules("test")
    assert not set(train) & set(test)
    assert len(train) > 3 * len(test) > 60
    assert not {"test", "idlelib"} & {*train, *test}


def test_documentation_is_read_without_importing(tmp_path: Any) -> None:
    file = tmp_path / "one.py"
    file.write_text('"""' + "a" * 50 + '"""\nraise SystemExit\ndef f():\n    """short"""\n')
    assert list(_docs(file)) == ["a" * 50]


def test_a_change_is_paired_by_window() -> None:
    before, after = line("bf16", [1.0, 3.0], 0, True), line("int4", [1.1, 3.1], 0.1, False)
    assert change(after, before) == "+10.52 ± 0.00"  # windows differ much from each other, and not in the change
    assert change(before, before) == "0"


@pytest.mark.parametrize(("equal", "said"), [(True, "all bits"), (False, "100")])
def test_equal_bits_are_said(equal: bool, said: str) -> None:
    table = quality_table([line("bf16", [1.0, 1.0], 0, True), line("other", [1.0, 1.0], 0, equal)])
    assert said in table.splitlines()[3]
