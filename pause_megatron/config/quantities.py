"""Large numbers as people read them. No torch."""

from __future__ import annotations

_PREFIXES = ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))


def scaled(value: float) -> str:
    """1234567 -> "1.235 M": three decimals and an SI prefix, to stand before a unit; "12 " below a thousand."""
    for power, prefix in _PREFIXES:
        if value >= 10**power:
            return f"{value / 10**power:.3f} {prefix}"
    return f"{value:.0f} "
