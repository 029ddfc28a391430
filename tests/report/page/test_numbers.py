"""Numbers as people read them."""

import math

import pytest

from qft_plugin.report.page.numbers import DASH, counted, duration, number, percent, short, size


def plain(words: str) -> str:
    """Write ordinary spaces."""
    return words.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, DASH),
        (math.nan, DASH),
        (math.inf, "∞"),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (0.0999999, "0.100"),
        (9.9996, "10.0"),
        (-3.2, "\N{MINUS SIGN}3.20"),
        (123456, "123,000"),
        (1.5e-6, "1.50 \N{MULTIPLICATION SIGN} 10⁻⁶"),
        (2.5e7, "2.50 \N{MULTIPLICATION SIGN} 10⁷"),
    ],
)
def test_numbers_have_three_digits(value: float | None, words: str) -> None:
    """Small and large ones have a power of ten; what is not there is a dash."""
    assert plain(number(value)) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, DASH),
        (math.nan, DASH),
        (0.0, "0 %"),
        (1e-6, "< 0.01 %"),
        (0.00123, "0.12 %"),
        (0.00999, "1.0 %"),
        (0.906, "90.6 %"),
        (0.9997, "99.97 %"),
        (0.999999, "> 99.99 %"),
        (1.0, "100.0 %"),
    ],
)
def test_shares_are_never_rounded_to_none_or_all(value: float | None, words: str) -> None:
    """Near 0 and near 100 there is one more decimal, and only 0 and 1 are written as such."""
    assert plain(percent(value)) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (math.nan, DASH),
        (0.524, "0.52 s"),
        (12.34, "12.3 s"),
        (672, "11 min 12 s"),
        (3599.9, "1 h 00 min"),
        (4000, "1 h 07 min"),
    ],
)
def test_durations_have_the_unit_that_fits(seconds: float, words: str) -> None:
    """Seconds, minutes and hours."""
    assert plain(duration(seconds)) == words


def test_other_units() -> None:
    """Bytes have powers of a thousand, counts their noun, axes no zeros at the end."""
    assert [plain(size(n)) for n in (812, 12_300, 3_463_000, 4_100_000_000)] == [
        "812 bytes",
        "12.3 kB",
        "3.46 MB",
        "4.10 GB",
    ]
    assert [counted(n, "layer") for n in (0, 1, 2000)] == ["0 layers", "1 layer", "2,000 layers"]
    assert [plain(short(v)) for v in (0.02, 12.5, 100, 1e-7)] == [
        "0.02",
        "12.5",
        "100",
        "1 \N{MULTIPLICATION SIGN} 10⁻⁷",
    ]
