"""Names in a run folder, and which of its checkpoints is meant. No torch.

    RUN/.checkpoints.json              the step that `latest` was last pointed to by a save
    RUN/checkpoints/latest             a symbolic link to a checkpoint; where there are none, a file with its name
    RUN/checkpoints/step-00000200/
    RUN/checkpoints/set-aside-step-00000200/   what a roll-back or damage left behind: renamed, never deleted

One rule for everybody (resume, export-hf, generate, evaluate, model.from): **the newest complete checkpoint, unless
`latest` was moved back by hand; then the one that it names**, or the newest complete one before it. A save moves
`latest` only once its target is complete, so a `latest` that is older than the newest checkpoint is either a save that
was killed in between, or a roll-back. The record of the step that it was last pointed to tells them apart; where that
is missing (a copy without hidden files), the time at which `latest` was made does.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from pause_megatron.files.durable import read_regular, write_whole

CHECKPOINTS, LATEST, MANIFEST, SET_ASIDE = "checkpoints", "latest", "manifest.json", "set-aside-"
_STEP = re.compile(r"step-(\d{8,})")
_LONGEST_NAME = 4096
_LARGEST_MANIFEST = 1 << 30


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
    if path.name == LATEST and not (is_copy(path) and _copied_step(path.parent) is None):
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


def is_copy(latest: Path) -> bool:
    """Whether a folder stands in the place of `latest`, as a copy that follows links leaves it."""
    return latest.is_dir() and not latest.is_symlink()


def record_of(checkpoints: Path) -> Path:
    """Where that record is."""
    return checkpoints.with_name(f".{checkpoints.name}.json")


def choose_in(checkpoints: Path) -> Choice:
    """Those of `RUN/checkpoints`."""
    found = {step: [checkpoints / step_name(step)] for step in steps_in(checkpoints)}
    if (copied := _copied_step(checkpoints)) is not None:
        found.setdefault(copied, []).append(checkpoints / LATEST)
    steps = sorted(found, reverse=True)
    if not steps:  # a copy of latest alone, though it may be damaged
        copy = checkpoints / LATEST
        return Choice((copy.resolve(),) if is_copy(copy) and (copy / MANIFEST).is_file() else ())
    pointed, notes = pointed_to(checkpoints), _lead_nowhere(checkpoints)
    target = step_of(pointed) if pointed else copied
    if pointed and target not in found:
        notes.append(f"{checkpoints / LATEST} names {pointed}, which is not there")
    elif target is not None and target < steps[0]:
        newer = ", ".join(step_name(step) for step in reversed(steps) if step > target)
        if _moved_back(checkpoints, target, steps[0]):
            notes.append(f"passed over: {newer}; {checkpoints / LATEST} was moved back to {step_name(target)}")
            steps = [step for step in steps if step <= target]
        elif last_published(checkpoints) is None:
            notes.append(
                f"{checkpoints / LATEST} is {step_name(target)}, older than {newer}; whether it was moved back says "
                f"{record_of(checkpoints)}, which is not there: taking the newest; to roll back, point it there again"
            )
        else:
            notes.append(f"{checkpoints / LATEST} is still {step_name(target)}: a save ended before it was {newer}")
    return Choice(tuple(folder.resolve() for step in steps for folder in found[step]), "; ".join(notes))


def _lead_nowhere(checkpoints: Path) -> list[str]:
    """A line for each link with the name of a checkpoint whose folder is not there (an archive, not mounted)."""
    links = sorted(path for path in checkpoints.glob("step-*") if step_of(path.name) is not None)
    return [f"passed over: {path} leads to {os.readlink(path)}, which is not there" for path in links if _dangles(path)]


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _moved_back(checkpoints: Path, target: int, newest: int) -> bool:
    """Whether somebody has pointed `latest` at an older checkpoint, not a save that ended before it moved it."""
    if (published := last_published(checkpoints)) is not None:
        return target < published
    if is_copy(checkpoints / LATEST):
        return False
    try:
        made = (checkpoints / step_name(newest) / MANIFEST).stat().st_mtime_ns
        return (checkpoints / LATEST).lstat().st_mtime_ns > made
    except OSError:
        return False


def _copied_step(checkpoints: Path) -> int | None:
    """The step of a checkpoint that stands in the place of `latest`."""
    latest = checkpoints / LATEST
    if not is_copy(latest):
        return None
    try:
        step = json.loads(read_regular(latest / MANIFEST, _LARGEST_MANIFEST))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None
