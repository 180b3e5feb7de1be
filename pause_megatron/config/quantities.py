"""Large numbers with SI prefixes."""

from __future__ import annotations

_PREFIXES = ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))


def scaled(value: float) -> str:
    """Return a number with three decimals and an SI prefix, for use before a unit: 1234567 is "1.235 M".

    Args:
        value: A number; below a thousand it has no decimals and no prefix ("12 ").
    """
    for power, prefix in _PREFIXES:
        if value >= 10**power:
            return f"{value / 10**power:.3f} {prefix}"
    return f"{value:.0f} "
