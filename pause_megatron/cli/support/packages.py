"""The message for a package that a verb needs and that is not installed. Imports none of them."""

from __future__ import annotations

import importlib.util

from pause_megatron import versions

EXTRAS = {
    package.name.replace("-", "_"): extra
    for extra, packages in reversed(versions.EXTRAS.items())  # of several extras, the first
    for package in packages
    if extra not in ("test", "docs", "dev")
}
"""The extra that installs a package, by its import name."""

_ALONE = {"transformer_engine": "transformer_engine[pytorch]"}


def absent_package(error: ModuleNotFoundError) -> str | None:
    """Return how to install the package that an import did not find.

    Args:
        error: The failed import.

    Returns:
        One line; None where the package is installed, so that the failing import is a defect inside it.
    """
    name = (error.name or "").partition(".")[0]
    if not name or importlib.util.find_spec(name) is not None:
        return None
    wanted = f"pause-megatron[{EXTRAS[name]}]" if name in EXTRAS else _ALONE.get(name, name)
    return f"needs the package {name}, which is not installed: pip install '{wanted}'"
