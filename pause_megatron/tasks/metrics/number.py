"""GSM8K's final number: a worked solution ends in "#### N" (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

# lm-eval's two patterns: the number directly after the first mark (strict), and the last number anywhere (flexible).
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_ANYWHERE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def final_number(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the number after the prediction's first "#### " is a reference's, else 0.0 (strict match).

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    return _equal(_marked(prediction), references)


def final_number_flexible(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction's last number is a reference's, else 0.0 (flexible match).

    Args:
        prediction: The answer, `answer_in` of the generated text.
        references: Accepted answers.
    """
    return _equal(_last(prediction), references)


def number_in(reference: str) -> Decimal | None:
    """Return the number of a reference: the one after "#### ", else the last one, else None."""
    marked = _marked(reference)
    return _number(marked if marked is not None else _last(reference))


def _equal(found: str | None, references: Sequence[str]) -> float:
    number = _number(found)
    return float(number is not None and any(number == number_in(reference) for reference in references))


def _number(text: str | None) -> Decimal | None:
    """Return the value of a written number, so that "$1,000.", "1000" and "1000.0" are equal."""
    if text is None:
        return None
    try:
        return Decimal(text.replace(",", "").replace("$", "").removesuffix("."))
    except InvalidOperation:  # "1.2.3", "..."
        return None


def _marked(text: str) -> str | None:
    found = _MARKED.search(text)
    return found.group(1) if found else None


def _last(text: str) -> str | None:
    found = [match.group() for match in _ANYWHERE.finditer(text)]
    return found[-1] if found else None
