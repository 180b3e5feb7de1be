"""One HTML page with everything in it: style, tables, pictures. It needs nothing from outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = Path(__file__).resolve().parent / "page.css"


@dataclass(frozen=True)
class Part:
    """A section of the page: a title, and HTML below it."""

    title: str
    html: str


def render(title: str, lead: str, parts: Sequence[Part]) -> str:
    """The page.

    Args:
        lead: HTML below the title.
    """
    body = "\n".join(f"<h2>{escape(part.title)}</h2>\n{part.html}" for part in parts if part.html)
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{lead}\n{body}\n</body></html>\n"
    )


def picture(path: Path, alt: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p class=picture><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}"></p>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
