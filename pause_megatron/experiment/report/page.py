"""One self-contained HTML page with style, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = Path(__file__).resolve().parent / "page.css"


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        title: Title, plain text.
        html: Content, HTML.
    """

    title: str
    html: str


def render(title: str, lead: str, parts: Sequence[Part]) -> str:
    """Return the page.

    Args:
        title: Title, plain text.
        lead: HTML below the title.
        parts: The sections.
    """
    body = "\n".join(f"<h2>{escape(part.title)}</h2>\n{part.html}" for part in parts if part.html)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{lead}\n{body}\n</body></html>\n"
    )


def picture(path: Path, alt: str) -> str:
    """Return a PNG as inline HTML.

    Args:
        path: The PNG.
        alt: Alternative text.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p class=picture><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}"></p>'


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
