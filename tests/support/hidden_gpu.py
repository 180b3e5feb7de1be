"""When the suite shows the GPU to its tests. No torch: this is asked before it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _pytest.mark.expression import Expression


def asks_for_gpu(expression: str, paths: Sequence[str], root: Path) -> bool:
    """Whether pytest was asked for tests on a GPU: by `-m gpu`, or by paths that are all under tests/gpu.

    Args:
        expression: of `-m`, "" without.
        paths: what is to be collected, relative to the current folder or absolute.
        root: the repository.
    """
    if expression and _chooses_gpu(expression):
        return True
    folder = (root / "tests" / "gpu").resolve()
    places = [Path(path.split("::")[0]).resolve() for path in paths]
    return bool(places) and all(place == folder or folder in place.parents for place in places)


def _chooses_gpu(expression: str) -> bool:
    """Whether a test is selected by its mark `gpu`, with any other marks."""
    chosen = Expression.compile(expression)
    for others in (False, True):
        with_gpu, without = (
            chosen.evaluate(lambda name, /, o=others, g=gpu, **_: g if name == "gpu" else o) for gpu in (True, False)
        )
        if with_gpu and not without:
            return True
    return False
