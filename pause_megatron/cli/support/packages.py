"""What to say where a package is absent that a verb turns out to need. Nothing is imported to say it."""

from __future__ import annotations

import importlib.util

from pause_megatron import versions

EXTRAS = {
    package.name.replace("-", "_"): extra
    for extra, packages in reversed(versions.EXTRAS.items())  # of several extras, the first
    for package in packages
    if extra not in ("test", "docs", "dev")
}
"""The extra that brings a package, by the name that it is imported under."""

_ALONE = {"transformer_engine": "transformer_engine[pytorch]"}


def absent_package(error: ModuleNotFoundError) -> str | None:
    """One line about the package that an import did not find, and how to install it.

    Returns:
        None: the package is there, and the import inside it is a fault of somebody's.
    """
    name = (error.name or "").partition(".")[0]
    if not name or importlib.util.find_spec(name) is not None:
        return None
    wanted = f"pause-megatron[{EXTRAS[name]}]" if name in EXTRAS else _ALONE.get(name, name)
    return f"needs the package {name}, which is not installed: pip install '{wanted}'"
