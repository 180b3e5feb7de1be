"""Names in a run folder, and the rule that chooses one of its checkpoints.

    RUN/.checkpoints.json              the published step: the one that a save last moved `latest` to
    RUN/checkpoints/latest             a symbolic link to a checkpoint; without symbolic links, a file with its name
    RUN/checkpoints/step-00000200/
    RUN/checkpoints/set-aside-step-00000200/   a checkpoint passed over on resume: renamed, never deleted

The rule of resume, export-hf, generate, evaluate and model.from: **the newest complete checkpoint, unless `latest` was
moved back by hand; then the one that it names**, or the newest complete one before it. A save moves `latest` only once
its target is complete. So a `latest` that is older than the newest checkpoint is either a save that was killed in
between, or a roll-back. The record of the published step tells them apart. Where it is missing (a copy without hidden
files), the modification time of `latest` does.
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
    """The checkpoints that a path means.

    Attributes:
        folders: Checkpoints in the order in which they are tried; the later ones are used if the earlier are damaged.
        note: What is unusual about the choice, in one line; "": nothing.
    """

    folders: tuple[Path, ...]
    note: str = ""


def step_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match.group(1)) if match and step_name(int(match.group(1))) == name else None


def steps_in(checkpoints: Path) -> list[int]:
    """Return the steps of the published checkpoints, ascending.

    Args:
        checkpoints: `RUN/checkpoints`.
    """
    if not checkpoints.is_dir():
        return []
    steps = (step_of(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def choose(path: str | Path) -> Choice:
    """Return the checkpoints that a path means; `folders` is empty where there is none.

    Args:
        path: A checkpoint, `.../latest`, `RUN/checkpoints` or `RUN`.
    """
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
    """Return the step that a save last moved `latest` to, 0 before the first; None: not known.

    Args:
        checkpoints: `RUN/checkpoints`.
    """
    try:
        step = json.loads(record_of(checkpoints).read_text(encoding="utf-8"))["published"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None


def record_published(checkpoints: Path, step: int) -> None:
    """Write the record that `last_published` reads.

    Args:
        checkpoints: `RUN/checkpoints`.
        step: The published step.
    """
    write_whole(record_of(checkpoints), json.dumps({"published": step}).encode())


def pointed_to(checkpoints: Path) -> str:
    """Return the name that `latest` points to; "" where it is a folder (a copy that followed the link) or unreadable.

    Args:
        checkpoints: `RUN/checkpoints`.
    """
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
    """Return whether `latest` is a folder, as in a copy that followed links."""
    return latest.is_dir() and not latest.is_symlink()


def record_of(checkpoints: Path) -> Path:
    """Return the path of the record of the published step."""
    return checkpoints.with_name(f".{checkpoints.name}.json")


def choose_in(checkpoints: Path) -> Choice:
    """Return the checkpoints that a folder of checkpoints means.

    Args:
        checkpoints: `RUN/checkpoints`.
    """
    found = {step: [checkpoints / step_name(step)] for step in steps_in(checkpoints)}
    if (copied := _copied_step(checkpoints)) is not None:
        found.setdefault(copied, []).append(checkpoints / LATEST)
    steps = sorted(found, reverse=True)
    if not steps:  # a copy of `latest` alone, which may be damaged
        copy = checkpoints / LATEST
        return Choice((copy.resolve(),) if is_copy(copy) and (copy / MANIFEST).is_file() else ())
    pointed, notes = pointed_to(checkpoints), _dangling_links(checkpoints)
    target = step_of(pointed) if pointed else copied
    if pointed and target not in found:
        notes.append(f"{checkpoints / LATEST} names {pointed}, which does not exist")
    elif target is not None and target < steps[0]:
        newer = ", ".join(step_name(step) for step in reversed(steps) if step > target)
        if _moved_back(checkpoints, target, steps[0]):
            notes.append(f"passed over: {newer}; {checkpoints / LATEST} was moved back to {step_name(target)}")
            steps = [step for step in steps if step <= target]
        elif last_published(checkpoints) is None:
            notes.append(
                f"{checkpoints / LATEST} is {step_name(target)}, older than {newer}; {record_of(checkpoints)}, "
                "which would show a roll-back, does not exist: using the newest; to roll back, move `latest` again"
            )
        else:
            notes.append(
                f"{checkpoints / LATEST} is still {step_name(target)}: a save was killed before it moved it to {newer}"
            )
    return Choice(tuple(folder.resolve() for step in steps for folder in found[step]), "; ".join(notes))


def _dangling_links(checkpoints: Path) -> list[str]:
    """Return a line for each dangling link with a checkpoint's name (to an archive that is not mounted)."""
    links = sorted(path for path in checkpoints.glob("step-*") if step_of(path.name) is not None)
    return [
        f"passed over: {path} links to {os.readlink(path)}, which does not exist" for path in links if _dangles(path)
    ]


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _moved_back(checkpoints: Path, target: int, newest: int) -> bool:
    """Return whether `latest` was moved back by hand, and not left behind by a save that was killed."""
    if (published := last_published(checkpoints)) is not None:
        return target < published
    if is_copy(checkpoints / LATEST):
        return False
    try:
        saved = (checkpoints / step_name(newest) / MANIFEST).stat().st_mtime_ns
        return (checkpoints / LATEST).lstat().st_mtime_ns > saved
    except OSError:
        return False


def _copied_step(checkpoints: Path) -> int | None:
    """Return the step of a checkpoint folder in the place of `latest`; None where there is none."""
    latest = checkpoints / LATEST
    if not is_copy(latest):
        return None
    try:
        step = json.loads(read_regular(latest / MANIFEST, _LARGEST_MANIFEST))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None
