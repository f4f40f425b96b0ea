import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import units
from offload.errors import UsageError
from offload.units import format_bytes, format_count, format_moved, format_rate, format_seconds, parse_bytes, parse_rate


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8GB", 8 * 10**9),
        ("8G", 8 << 30),
        ("8gib", 8 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5KiB", 1536),
        (".5k", 512),
        ("1_000", 1000),
        ("1,000 B", 1000),
        ("2TB", 2 * 10**12),
        ("0", 0),
        (4096, 4096),
        (1.5, 1),
    ],
)
def test_sizes(text: str | float, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 GiBs", "-1", "1e9", "8GB/s", "0x10", "1..2", -1, math.nan, math.inf, True]
)
def test_what_is_no_size(text: str | float) -> None:
    with pytest.raises(UsageError, match="cpu_memory="):
        parse_bytes(text, "cpu_memory")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("4GB/s", 4e9), ("500MiB/s", 500 * 2**20), ("8 GBps", 8e9), ("1G", 2**30), (2.5e9, 2.5e9), (7, 7.0)],
)
def test_rates(text: str | float, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "0", "0GB/s", 0, -1, "fast", "8GB/h"])
def test_what_is_no_rate(text: str | float) -> None:
    with pytest.raises(UsageError, match=r"link=.*(8GB/s|above 0)"):
        parse_rate(text, "link")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1536, "1.50 KiB"),
        (8 << 30, "8.00 GiB"),
        (24 << 30, "24.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_formatted_sizes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_other_formats() -> None:
    assert format_rate(3.52e9) == "3.52 GB/s"
    assert format_rate(12) == "12.00 B/s"
    assert [format_moved(n) for n in (0, 11_850_000, 58.52e9)] == ["0.00 B", "11.85 MB", "58.52 GB"]
    assert [format_count(n) for n in (12, 9_475_328, 672_188_416, 999_600_000, 3_020_000_000, 70_553_706_496)] == [
        "12", "9.48 M", "672 M", "1.00 B", "3.02 B", "70.6 B",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0, 24e-6, 0.000996)] == ["0.0 ms", "24.0 us", "1.0 ms"]
    assert [format_seconds(s) for s in (0.0121, 0.83, 12.34, 200)] == ["12.1 ms", "0.83 s", "12.3 s", "3 min 20 s"]


@given(st.integers(min_value=0, max_value=1 << 50))
def test_what_is_printed_reads_back(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.006, abs=1)


@given(st.text(max_size=20))
def test_text_is_a_size_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse_bytes(text) >= 0


def test_1000_and_1024() -> None:
    assert (units.KIB, units.MIB, units.GIB) == (1024, 1024**2, 1024**3)
