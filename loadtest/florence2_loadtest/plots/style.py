"""How all plots look: one palette, one size of text, units on axes, words beside lines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

# The report turns these very colours into variables of its style sheet, so that they follow light and dark.
INK, MUTED, FAINT, PAPER = "#1f2328", "#5b636d", "#d5dae0", "#ffffff"
# After Okabe and Ito: told apart with any colour vision, and on a dark ground too.
BLUE, ORANGE, GREEN, PURPLE, SKY, BROWN, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b4609a",
    "#56b4e9",
    "#a6761d",
    "#8c959f",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, BROWN)
WIDTH_IN = 7.4
SMALL_PT, TEXT_PT, TITLE_PT = 7.5, 8.5, 9.5
_LINE = 1.25  # height of a line by its font's size
_POINTS_PER_INCH = 72

STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT_PT,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": TITLE_PT,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": TEXT_PT,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.labelsize": TEXT_PT,
    "ytick.labelsize": TEXT_PT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": TEXT_PT,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "florence2",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Plot:
    """A picture that can be drawn alone or as a part of a page.

    Attributes:
        title: Says what it shows.
        alt: Says in words what is to be seen, for who can't see it.
        height_in: Of its own figure, in inches.
        draw: Draws it onto a figure or a part of one.
    """

    title: str
    alt: str
    height_in: float
    draw: Callable[[FigureBase], None]

    def figure(self) -> Figure:
        """Returns a figure of its own, ready to be saved."""
        with mpl.rc_context(STYLE):
            figure = new_figure(WIDTH_IN, self.height_in)
            self.draw(figure)
            return figure

    def save(self, path: Path) -> None:
        """Writes a PNG, SVG or PDF, by the path's suffix."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE), any_letters():
            self.figure().savefig(path, dpi=160)


@contextmanager
def any_letters() -> Iterator[None]:
    """Keeps matplotlib from warning of letters that its font lacks; a box in their place says as much."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def new_figure(width_in: float, height_in: float) -> Figure:
    """Returns an empty figure that keeps what is drawn onto it from colliding."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width_in, height_in), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def grid(axes: Axes, axis: Literal["both", "x", "y"] = "y") -> None:
    """Draws thin lines at an axis' ticks, and none of the other's spine."""
    axes.grid(visible=True, axis=axis)
    axes.tick_params(length=2.5)
    side = "left" if axis == "y" else "bottom"
    if axis != "both":
        axes.spines[side].set_visible(False)
        axes.tick_params(axis=axis, length=0)


def from_zero(axes: Axes, room: float = 1.08) -> None:
    """Has the y axis begin at zero, with some room above."""
    top = axes.dataLim.y1
    axes.set_ylim(0, room * top if top > 0 else 1)


def whole_numbers(axes: Axes, axis: str = "y", most: int = 6) -> None:
    """Ticks an axis at whole numbers."""
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=2))


def plain_numbers(axes: Axes, axis: str = "y") -> None:
    """Writes an axis' numbers without powers of ten."""
    getattr(axes, f"{axis}axis").set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def beside(axes: Axes, text: str, x: float, y: float) -> None:
    """Writes a few words at the right of where a bar ends."""
    axes.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", size=SMALL_PT, color=INK)


def say_nothing(axes: Axes, text: str) -> None:
    """Writes why there is nothing to see."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def label_ends(axes: Axes, labels: Iterable[tuple[float, str, str]], size: float = TEXT_PT) -> None:
    """Writes (y, text, colour) at the right of the axes, each as near to its y as the others let it.

    Limits and scale of the axes must be set.
    """
    placed = sorted((_height(axes, y), text, colour) for y, text, colour in labels)
    inches = axes.get_position().height * _inches(axes)
    step = size * _LINE / _POINTS_PER_INCH / max(0.5, 0.8 * inches)  # titles and labels take some of the height
    for at, (y, text, colour) in zip(spread([y for y, _, _ in placed], step), placed, strict=True):
        if abs(at - y) > 0.6 * step:
            axes.plot((1.0, 1.02), (y, at), color=colour, linewidth=0.6, transform=axes.transAxes, clip_on=False)
        axes.text(1.03, at, text, color=colour, size=size, transform=axes.transAxes, va="center", ha="left")


def spread(places: Sequence[float], step: float) -> list[float]:
    """Returns ascending `places` moved apart to `step` at least, as little as that takes."""
    groups: list[list[float]] = []  # of each: the sum of its members' places, less their offsets; their number
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _end(groups[-2], step) > _begin(groups[-1], step):
            total, members = groups.pop()
            before = groups[-1]
            before[0] += total - members * before[1] * step
            before[1] += members
    return [group[0] / group[1] + index * step for group in groups for index in range(int(group[1]))]


def _begin(group: Sequence[float], step: float) -> float:
    return group[0] / group[1]


def _end(group: Sequence[float], step: float) -> float:
    return group[0] / group[1] + group[1] * step


def _height(axes: Axes, y: float) -> float:
    """Where a value lies on the y axis, from 0 at the bottom to 1 at the top."""
    scaled = axes.transScale.transform((1.0, max(y, 1e-12)))
    return float(axes.transLimits.transform(scaled)[1])


def _inches(axes: Axes) -> float:
    part, whole = axes.get_figure(root=False), axes.get_figure(root=True)
    return float(part.bbox.height / whole.dpi) if part is not None and whole is not None else 1.0
