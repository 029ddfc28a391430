"""Numbers as people read them: few digits, units, and a dash where there is none."""

import math
from typing import Final

DASH: Final = "\N{EN DASH}"
NBSP: Final = "\N{NO-BREAK SPACE}"
TIMES: Final = "\N{MULTIPLICATION SIGN}"
MINUS: Final = "\N{MINUS SIGN}"
SUPERSCRIPTS: Final = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def known(value: float | None) -> bool:
    """Whether a value is a number: not `None`, and not NaN."""
    return value is not None and not math.isnan(value)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with significant digits: 0.0123, 12.3, 1,230, 1.23 x 10^-6."""
    if value is None or math.isnan(value):
        return DASH
    sign = MINUS if value < 0 else ""
    size = abs(value)
    if math.isinf(size):
        return f"{sign}\N{INFINITY}"
    if size == 0:
        return "0"
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    power = int(exponent)
    if not -5 < power < 6:
        return f"{sign}{mantissa}{NBSP}{TIMES}{NBSP}10{str(power).translate(SUPERSCRIPTS)}"
    rounded = round(size, digits - 1 - power)
    return f"{sign}{rounded:,.{max(0, digits - 1 - power)}f}"


def short(value: float) -> str:
    """Write a round number, of an axis, without zeros behind its last digit."""
    front, times, power = number(value, 4).partition(f"{NBSP}{TIMES}{NBSP}")
    return (front.rstrip("0").rstrip(".") if "." in front else front) + times + power


def percent(value: float | None) -> str:
    """Write a share, 0 to 1, as percent: one decimal, two where it is near 0 or 100."""
    if value is None or math.isnan(value):
        return DASH
    hundred = 100 * value
    if hundred == 0:
        return f"0{NBSP}%"
    if 0 < hundred < 0.005:
        return f"<{NBSP}0.01{NBSP}%"
    if 99.995 <= hundred < 100:
        return f">{NBSP}99.99{NBSP}%"
    close = abs(hundred) < 0.995 or 99.9 <= hundred < 100
    return f"{hundred:.{2 if close else 1}f}{NBSP}%".replace("-", MINUS)


def count(value: int | None) -> str:
    """Write a whole number with separators."""
    return DASH if value is None else f"{value:,}"


def counted(value: int, one: str, many: str = "") -> str:
    """Write a whole number with its noun, in the singular for 1."""
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def size(value: int | None) -> str:
    """Write a number of bytes: 812 bytes, 12.3 kB, 3.46 MB, 4.10 GB."""
    if value is None:
        return DASH
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if value >= 10**power:
            return f"{number(value / 10**power)}{NBSP}{unit}"
    return f"{value}{NBSP}bytes"


def duration(seconds: float | None) -> str:
    """Write a time: 0.52 s, 12.3 s, 11 min 12 s, 1 h 02 min."""
    if seconds is None or math.isnan(seconds):
        return DASH
    if seconds < 60:
        return f"{number(seconds, 3 if seconds >= 1 else 2)}{NBSP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60:02d}{NBSP}s"
    whole = round(seconds / 60)
    return f"{whole // 60}{NBSP}h {whole % 60:02d}{NBSP}min"
