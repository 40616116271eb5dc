"""Numbers as people read them, in reports, plots and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTHING = "–"
_ROOM = 60  # characters


def seconds(value: float | None) -> str:
    """Returns a time with three digits and its unit: ``1.31 s``, ``38.2 ms``."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0 s"
    if abs(value) < 0.9995e-3:
        return f"{digits(1e6 * value)} µs"
    if abs(value) < 0.9995:
        return f"{digits(1e3 * value)} ms"
    return f"{digits(value)} s"


def rate(value: float | None) -> str:
    """Returns a rate with its unit: ``24.3/s``."""
    return NOTHING if value is None else f"{digits(value)}/s"


def digits(value: float | None, most: int = 3) -> str:
    """Returns a number with `most` significant digits, never as a power of ten."""
    if value is None:
        return NOTHING
    if value == 0 or abs(value) >= 10 ** (most - 1):
        return f"{value:,.0f}"
    decimals = most - 1
    size = float(f"{abs(value):.{most - 1}e}")  # as it will be written: 0.9996 is 1.00
    while size >= 10 and decimals > 0:
        size, decimals = size / 10, decimals - 1
    while size < 1 and decimals < 6:
        size, decimals = size * 10, decimals + 1
    return f"{value:.{decimals}f}"


def count(value: float | None) -> str:
    """Returns a whole number with its thousands apart."""
    return NOTHING if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    """Returns a share as a percentage; near to all of it with as many nines as there are."""
    if value is None:
        return NOTHING
    percent = 100 * value
    if 99 < percent < 100:
        # Never 100 % of what isn't all.
        return f"{min(percent, 99.99):.2f} %"
    return f"{percent:.0f} %" if percent >= 10 or percent == 0 else f"{percent:.2g} %"


def ratio(value: float | None) -> str:
    """Returns a ratio: ``3.2×``."""
    return NOTHING if value is None else f"{digits(value, 2 if value < 10 else 3)}×"


def settings(given: Mapping[str, Any], nothing: str = "defaults") -> str:
    """Returns settings on a line: ``max_batch_size 24, dtype bfloat16``."""
    return ", ".join(f"{name} {value}" for name, value in given.items()) or nothing


def shorten(text: str, room: int = _ROOM) -> str:
    """Returns `text` on one line, without its middle where it is longer than `room`."""
    text = " ".join(text.split())
    if len(text) <= room:
        return text
    kept = room - 1
    return f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"
