"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from itertools import count
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from florence2_kserve import __version__
from florence2_loadtest.pages.document import Document, Table
from florence2_loadtest.plots import style
from florence2_loadtest.plots.style import Plot

_TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
# Names in the style sheet, which has a second set of values for a dark ground.
_VARIABLES = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.FAINT: "faint",
    style.PAPER: "paper",
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.PURPLE: "purple",
    style.SKY: "sky",
    style.BROWN: "brown",
    style.GREY: "grey",
}
_COLOUR = re.compile("|".join(_VARIABLES))
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # XML can't say them, and HTML mustn't
_FONT = "'DejaVu Sans'"


def render_html(document: Document) -> str:
    """Returns the page of a report."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = count(1)
    environment.globals.update(
        svg=lambda plot: svg_of(plot, f"plot{next(numbers)}-"),
        is_table=lambda block: isinstance(block, Table),
        colours=_VARIABLES,
        version=__version__,
    )
    return _CONTROL.sub("", environment.get_template("report.html.j2").render(document=document))


def svg_of(plot: Plot, prefix: str) -> Markup:
    """Returns a plot as an ``<svg>`` for a page: its text as text, its colours by the page's style sheet.

    Args:
        plot: What to draw.
        prefix: Of all ids in it, so that those of several plots differ.
    """
    buffer = io.StringIO()
    with mpl.rc_context(style.STYLE), style.any_letters():
        plot.figure().savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    root = ET.fromstring(_CONTROL.sub("", buffer.getvalue()))
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: _page_value(v, prefix) for name, v in element.attrib.items()}
        if "id" in element.attrib:
            element.set("id", prefix + element.attrib["id"])
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": _CONTROL.sub("", f"{plot.title}. {plot.alt}")}
    # Serialised from a tree, so that all text in it is escaped.
    return Markup(ET.tostring(root, encoding="unicode"))


def _page_value(value: str, prefix: str) -> str:
    value = re.sub(r"^#(?=[A-Za-z]\w*$)(?![0-9a-f]{6}$)", f"#{prefix}", value)
    value = value.replace("url(#", f"url(#{prefix}").replace(_FONT, "var(--font)")
    return _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", value)
