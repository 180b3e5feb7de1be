"""Names in a run folder, and which of its checkpoints is meant. No torch.

    RUN/.checkpoints.json              the step that `latest` was last pointed to by a save
    RUN/checkpoints/latest             a symbolic link to a checkpoint; where there are none, a file with its name
    RUN/checkpoints/step-00000200/
    RUN/checkpoints/set-aside/         what a roll-back or damage left behind: moved here, never deleted

One rule for everybody (resume, export-hf, generate, evaluate, model.from): **the newest complete checkpoint, unless
`latest` was moved back by hand; then the one that it names**, or the newest complete one before it. A save moves
`latest` only once its target is complete, so a `latest` that is older than the newest checkpoint is either a save that
was killed in between, or a roll-back: the record of the step that it was last pointed to tells them apart.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.durable import write_whole

CHECKPOINTS, LATEST, MANIFEST, SET_ASIDE = "checkpoints", "latest", "manifest.json", "set-aside"
_STEP = re.compile(r"step-(\d{8,})")
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class Choice:
    """Attributes:
    folders: checkpoints in the order in which they are taken, should those before be damaged
    note: what is unusual about it, in one line; ""
    """

    folders: tuple[Path, ...]
    note: str = ""


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has this name; None: no such name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match and step_name(int(match.group(1))) == name else None


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that have a name, ascending."""
    if not checkpoints.is_dir():
        return []
    found = (step_of(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(step for step in found if step is not None)


def choose(path: str | Path) -> Choice:
    """The checkpoints that a path means: one itself, `.../latest`, `RUN/checkpoints` or `RUN`. None: no folders."""
    path = Path(path)
    if path.name == LATEST and (steps_in(path.parent) or not (path / MANIFEST).is_file()):
        return choose_in(path.parent)
    if (path / MANIFEST).is_file():
        return Choice((path.resolve(),))
    for checkpoints in (path, path / CHECKPOINTS):
        if (choice := choose_in(checkpoints)).folders:
            return choice
    return Choice(())


def last_published(checkpoints: Path) -> int | None:
    """The step that `latest` was last pointed to by a save, 0 before the first; None: not known."""
    try:
        step = json.loads(record_of(checkpoints).read_text(encoding="utf-8"))["published"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None


def record_published(checkpoints: Path, step: int) -> None:
    """Leaves the record that `last_published` reads."""
    write_whole(record_of(checkpoints), json.dumps({"published": step}).encode())


def pointed_to(checkpoints: Path) -> str:
    """What `latest` names; "" where it is a folder (a copy that followed the link), or nothing that can be read."""
    latest = checkpoints / LATEST
    try:
        if latest.is_symlink():
            return Path(os.readlink(latest)).name
        if not stat.S_ISREG(latest.stat().st_mode) or latest.stat().st_size > _LONGEST_NAME:
            return ""
        return Path(latest.read_text(encoding="utf-8").strip()).name
    except (OSError, ValueError):
        return ""


def record_of(checkpoints: Path) -> Path:
    """Where that record is."""
    return checkpoints.with_name(f".{checkpoints.name}.json")


def choose_in(checkpoints: Path) -> Choice:
    """Those of `RUN/checkpoints`."""
    steps = steps_in(checkpoints)
    if not steps:
        copied = checkpoints / LATEST
        return Choice((copied.resolve(),) if (copied / MANIFEST).is_file() else ())
    pointed, published = pointed_to(checkpoints), last_published(checkpoints)
    target, note = step_of(pointed), ""
    if pointed and target not in steps:
        note = f"{checkpoints / LATEST} names {pointed}, which is not there"
    elif target is not None and published is not None and target < published:
        newer = [step_name(step) for step in steps if step > target]
        steps = [step for step in steps if step <= target]
        note = f"{checkpoints / LATEST} was moved back to {pointed}"
        note += f", before {', '.join(newer)}" if newer else ""
    return Choice(tuple(_folders(checkpoints, reversed(steps))), note)


def _folders(checkpoints: Path, steps: Iterable[int]) -> Iterable[Path]:
    return ((checkpoints / step_name(step)).resolve() for step in steps)
