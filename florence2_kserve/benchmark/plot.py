"""Draws a benchmark's ratios and its sweeps with Pillow, which the engine needs anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _ROW, _LABEL, _CHART = 1200, 24, 26, 520, 420
_INK, _FAINT, _OURS, _WORSE, _MODEL = "#1a1a1a", "#c8c8c8", "#2463b0", "#b04a24", "#8a8a8a"


def draw_plot(data: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: bars for the ratios of speed, and a chart of step times for each sweep.

    Args:
        data: Figures as `Report` collects them.
        path: Where to.
    """
    ratios = [(name, value) for name, value in data["ratios"].items() if _is_speed(name)]
    sweeps = [
        (f"{profile}, capture {capture}", points)
        for profile, captures in data["sweeps"].items()
        for capture, points in captures.items()
        if len(points) > 1
    ]
    height = 3 * _MARGIN + 2 * _ROW + _ROW * max(1, len(ratios)) + (_CHART + _MARGIN) * len(sweeps)
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    machine = data["machine"]
    _text(
        draw,
        (_MARGIN, _MARGIN),
        f"Items a second, engine / baseline; {data['settings']['size']}, {machine.get('card', machine['cpu'])}, "
        f"{machine['threads']} thread(s), {machine['dtype']}",
        size=18,
    )
    _draw_bars(draw, ratios, _MARGIN + 2 * _ROW)
    top = 2 * _MARGIN + 2 * _ROW + _ROW * max(1, len(ratios))
    for title, points in sweeps:
        _draw_sweep(draw, title, points, top)
        top += _CHART + _MARGIN
    image.save(path, format="PNG")


def _is_speed(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "ratio" or last.startswith("ratio_vs_")


def _draw_bars(draw: ImageDraw.ImageDraw, ratios: Sequence[tuple[str, float]], top: int) -> None:
    if not ratios:
        return
    room = _WIDTH - _LABEL - 4 * _MARGIN
    longest = max(1.0, *(value for _, value in ratios))
    for index, (name, value) in enumerate(ratios):
        y = top + _ROW * index
        _text(draw, (_MARGIN, y), name)
        end = _LABEL + round(room * value / longest)
        draw.rectangle((_LABEL, y + 2, end, y + _ROW - 6), fill=_OURS if value >= 1 else _WORSE)
        _text(draw, (end + 6, y), f"{value:.2f}")
    one = _LABEL + round(room / longest)
    draw.line((one, top - 6, one, top + _ROW * len(ratios)), fill=_INK)


def _draw_sweep(draw: ImageDraw.ImageDraw, title: str, points: Sequence[Mapping[str, float]], top: int) -> None:
    """Step time over rows in flight, both axes logarithmic: measured, and by the roofline."""
    _text(draw, (_MARGIN, top), f"{title}: ms a decode step over rows in flight, measured (blue), roofline (grey)", 18)
    left, right, upper, lower = _MARGIN + 70, _WIDTH - 3 * _MARGIN, top + 2 * _ROW, top + _CHART - 2 * _ROW
    series = {
        name: [(point["rows"], 1e3 * point[name]) for point in points]
        for name in ("roofline_step_seconds", "step_seconds")
    }
    xs = [x for line in series.values() for x, _ in line]
    ys = [y for line in series.values() for _, y in line]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / min(xs)) / (math.log(max(xs) / min(xs)) or 1.0)
        up = math.log(y / low) / (math.log(high / low) or 1.0)
        return left + across * (right - left), lower - up * (lower - upper)

    tick = low
    while tick <= high * 1.001:
        _, y = place(min(xs), tick)
        draw.line((left, y, right, y), fill=_FAINT)
        _text(draw, (_MARGIN, y - 9), f"{tick:g}")
        tick *= 10
    for x, _ in series["step_seconds"]:
        at, _ = place(x, low)
        _text(draw, (at - 10, lower + 6), f"{x:.0f}")
    for (_, line), colour in zip(series.items(), (_MODEL, _OURS), strict=True):
        placed = [place(x, y) for x, y in line]
        draw.line(placed, fill=colour, width=3)
        for x, y in placed:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int = 14) -> None:
    draw.text(at, text, fill=_INK, font=ImageFont.load_default(size))
