"""One self-contained HTML page about a run: key figures, pictures, tables, and what they do not show."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from geneformer_ray.data import storage
from geneformer_ray.errors import InputError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["KeyFigure", "Picture", "Section", "Table", "render_report", "write_report"]

DPI = 130
# Below this, four decimals would show too little of a number.
SMALL = 1e-3


@dataclass(frozen=True)
class KeyFigure:
    """A number that a reader should see first.

    Parameters
    ----------
    label
        What it is: "macro F1".
    value
        The number as it is to be read: "0.902".
    detail
        One line below it: "champion, mean pooling".
    """

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure and its words.

    Parameters
    ----------
    figure
        The figure.
    alt
        What a reader who cannot see it should know; not empty.
    caption
        A line below it.
    """

    figure: Figure
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table and its caption.

    Parameters
    ----------
    frame
        Rows to show, all of them; the first column heads each row.
    caption
        What the table holds.
    headings
        Words to show instead of a column's name.
    """

    frame: pd.DataFrame
    caption: str
    headings: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Parameters
    ----------
    title
        Heading, unique in the report.
    text
        Plain text; an empty line starts a new paragraph.
    figure, table
        Shown below the text.
    note
        A caveat, shown in a box: "the ranking of a toy model is not biology".
    """

    title: str
    text: str = ""
    figure: Picture | None = None
    table: Table | None = None
    note: str | None = None


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Sequence[KeyFigure],
    sections: Sequence[Section],
    lead: str = "",
    pictures: str | os.PathLike[str] | None = None,
) -> list[str]:
    """Write the report as one HTML file that needs nothing else: no script, font or picture from outside.

    Parameters
    ----------
    path
        The HTML file: a local path or a pyarrow filesystem URI.
    title
        Heading of the page.
    summary
        Key figures, shown as cards at the top.
    sections
        Parts of the report, in order.
    lead
        What was run, in a sentence or two below the title.
    pictures
        A directory (path or URI) that also gets each section's figure as `SECTION-TITLE.png`.

    Returns
    -------
    The paths of all files written, the report first.

    Raises
    ------
    InputError
        A figure has no alternative text, or two sections have the same title.
    """
    written = [storage.absolute(path)]
    images = _draw(sections)
    page = _page(title=title, lead=lead, summary=summary, sections=sections, images=images)
    storage.write_bytes(written[0], page.encode())
    for name, png in images.items() if pictures is not None else ():
        written.append(storage.join(storage.absolute(pictures or ""), f"{name}.png"))
        storage.write_bytes(written[-1], png)
    return written


def render_report(*, title: str, summary: Sequence[KeyFigure], sections: Sequence[Section], lead: str = "") -> str:
    """Give the page that `write_report` writes."""
    return _page(title=title, lead=lead, summary=summary, sections=sections, images=_draw(sections))


def _draw(sections: Sequence[Section]) -> dict[str, bytes]:
    """Draw each section's figure: PNG by the section's anchor."""
    anchors = [_anchor(section.title) for section in sections]
    for index, section in enumerate(sections):
        if anchors[index] in anchors[:index]:
            raise InputError("sections", f"two with the title {section.title!r}", "a title of its own for each section")
    images = {}
    for anchor, section in zip(anchors, sections, strict=True):
        if section.figure is not None:
            if not section.figure.alt.strip():
                raise InputError("alt", "nothing", f"words for the figure of {section.title!r}")
            buffer = io.BytesIO()
            # Without the software's name and version, the same figure is the same file.
            section.figure.figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            images[anchor] = buffer.getvalue()
    return images


def _page(
    *,
    title: str,
    lead: str,
    summary: Sequence[KeyFigure],
    sections: Sequence[Section],
    images: dict[str, bytes],
) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("geneformer_ray.manage").joinpath("report.html.j2").read_text(encoding="utf-8")
    parts = []
    for section in sections:
        anchor = _anchor(section.title)
        png = images.get(anchor)
        parts.append(
            {
                "anchor": anchor,
                "title": section.title,
                "paragraphs": _paragraphs(section.text),
                "picture": section.figure,
                "png": base64.b64encode(png).decode("ascii") if png else "",
                "table": _table(section.table) if section.table else None,
                "note": section.note,
            }
        )
    return environment.from_string(source).render(
        title=title, lead=_paragraphs(lead), summary=summary, sections=parts, contents=len(parts) > 2
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _table(table: Table) -> dict[str, Any]:
    """Cells as text, and which columns are numbers: those stand to the right, so that digits line up."""
    headings = table.headings or {}
    frame = table.frame
    numeric = [frame[column].dtype.kind in "iuf" for column in frame.columns]
    return {
        "caption": table.caption,
        "headings": [headings.get(str(column), str(column)) for column in frame.columns],
        "numeric": numeric,
        "rows": [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)],
    }


def _cell(value: object) -> str:
    """Write a value for reading: numbers in few digits, booleans as words, what is missing as a dash."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        text = f"{value:.2e}" if 0 < abs(value) < SMALL else f"{value:,.4f}"
        return text.replace("-", "\N{MINUS SIGN}", 1) if value < 0 else text
    return str(value)
