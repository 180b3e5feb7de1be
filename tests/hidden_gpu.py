"""When the suite shows the GPU to its tests. No torch: this is asked before it is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def asks_for_gpu(expression: str, paths: Sequence[str], root: Path) -> bool:
    """Whether pytest was asked for tests on a GPU: by `-m gpu`, or by paths that are all under tests/gpu.

    Args:
        expression: of `-m`, "" without.
        paths: what is to be collected, relative to the current folder or absolute.
        root: the repository.
    """
    if re.search(r"\bgpu\b", re.sub(r"\bnot\s+gpu\b", "", expression)):
        return True
    folder = (root / "tests" / "gpu").resolve()
    places = [Path(path.split("::")[0]).resolve() for path in paths]
    return bool(places) and all(place == folder or folder in place.parents for place in places)
