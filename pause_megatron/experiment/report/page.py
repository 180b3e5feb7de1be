"""Self-contained HTML pages: style and script inline, tables that sort, figures with captions."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
STYLE, SCRIPT = _FOLDER / "page.css", _FOLDER / "page.js"


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        title: Title, plain text.
        html: Content, HTML.
    """

    title: str
    html: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table that sorts by something else than its text.

    Attributes:
        html: Content, HTML.
        value: What the column is sorted by; None sorts last.
    """

    html: str
    value: float | str | None


Row = Sequence[str | Cell]


def render(title: str, lead: str, parts: Sequence[Part]) -> str:
    """Return the page.

    Args:
        title: Title, plain text.
        lead: HTML below the title.
        parts: The sections.
    """
    shown = [(f"part-{number}", part) for number, part in enumerate(parts, 1) if part.html]
    links = "".join(f'<li><a href="#{name}">{escape(part.title)}</a></li>' for name, part in shown)
    contents = f"<nav aria-label=Contents><ul>{links}</ul></nav>" if len(shown) > 2 else ""
    body = "\n".join(
        f"<section aria-labelledby={name}><h2 id={name}>{escape(part.title)}</h2>\n{part.html}</section>"
        for name, part in shown
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{lead}\n{contents}\n{body}\n</main>"
        f"<script>{SCRIPT.read_text(encoding='utf-8')}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Row], caption: str = "", *, sortable: bool = True) -> str:
    """Return an HTML table, which scrolls inside its own box where it is wider than the page.

    Args:
        head: Column heads, HTML.
        rows: Cells, HTML; the first of a row is its head.
        caption: Caption, HTML.
        sortable: Whether a click on a column's head sorts the rows.
    """
    caption_html = f"<caption>{caption}</caption>" if caption else ""
    head_html = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr>{_cell(row[0], 'th scope=row')}{''.join(_cell(cell, 'td') for cell in row[1:])}</tr>" for row in rows
    )
    kind = " class=sortable" if sortable else ""
    return (
        f"<div class=scroll role=region aria-label=Table tabindex=0><table{kind}>{caption_html}"
        f"<thead><tr>{head_html}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figures(pictures: Iterable[str]) -> str:
    """Return figures side by side where there is room, and below each other where there is not."""
    return f"<div class=figures>{''.join(pictures)}</div>"


def picture(path: Path, alt: str, caption: str = "") -> str:
    """Return a PNG as an inline figure.

    Args:
        path: The PNG.
        alt: Alternative text.
        caption: Caption, plain text.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">{below}</figure>'


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph.

    Args:
        text: Plain text.
        kind: CSS class.
    """
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """Return a list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def link(target: str, text: str) -> str:
    """Return a link.

    Args:
        target: Relative path.
        text: Plain text.
    """
    return f'<a href="{escape(target, quote=True)}">{escape(text)}</a>'


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names with their values.

    Args:
        pairs: (plain text, HTML).
    """
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{value}</dd>' for name, value in pairs)}</dl>"


def breakable(name: str) -> str:
    """Return a name as HTML that may break after "_" and "-" of its longer parts ("M_ft" stays whole).

    Args:
        name: Plain text.
    """
    return re.sub(r"(?<=\w\w)([_-])", r"\1<wbr>", escape(name))


def _cell(cell: str | Cell, tag: str) -> str:
    name = tag.split()[0]
    if isinstance(cell, str):
        return f"<{tag}>{cell}</{name}>"
    value = "" if cell.value is None else escape(str(cell.value), quote=True)
    return f'<{tag} data-value="{value}">{cell.html}</{name}>'
