"""A grid whose runs take seconds, made-up records for its task, and cells that take less than a second."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pause_megatron.experiment.cell import OUTPUT, Cell
from pause_megatron.experiment.folder import LocatedCell
from pause_megatron.experiment.stored import CellFile

GRID = """
name: small
seeds: [1]
models:
  StdPT:
    recipe: tiny-std
    set:
      model.layers: 2
      model.hidden: 32
      model.heads: 2
      data.sequence_length: 64
      train.steps: 2
      optim.warmup_steps: 0
      batch.global_size: 4
      validation.every: 0
      log.tensorboard: false
finetune:
  set:
    train.steps: 40
    optim.warmup_steps: 1
    optim.lr: 1e-3
    batch.global_size: 4
    batch.micro_size: 4
    engine.precision: fp32
    checkpoint.every: 2
    validation.every: 0
    log.tensorboard: false
    log.samples_every: 0
evaluate: {limit: 8, batch_size: 8}
tasks:
  web_questions: {pauses: [3]}
variants:
  StdPT_StdFT: {model: StdPT, finetune: standard}
  StdPT_PauseFT: {model: StdPT, finetune: pauses}
curves:
  - {variants: [StdPT_PauseFT], pauses: [0, 3]}
"""


def write_grid(path: Path, text: str = GRID) -> Path:
    """The grid as a file."""
    path.write_text(text, encoding="utf-8")
    return path


def write_records(root: Path) -> Path:
    """Records of web_questions below a folder of task folders."""
    folder = root / "webquestions"
    folder.mkdir(parents=True)
    for split, start in (("train", 0), ("test", 100)):
        records = [
            {"question": f"what comes after {number}?", "answers": [str(number + 1)]}
            for number in range(start, start + 30)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def cheap_cell(name: str, source: Cell | None = None, scores: Cell | None = None) -> Cell:
    """A cell whose verb answers at once. It leaves nothing behind, so its product must lie there: `give_product`."""
    arguments = ("--dry-run", "--recipe", "tiny-std", f"run.dir={OUTPUT}")
    return Cell(name, "pretrain", arguments, {"name": name}, source, scores)


def place_cells(directory: Path, cells: Iterable[Cell]) -> dict[str, LocatedCell]:
    """Folders with cell.json, as an experiment has them."""
    placed = {}
    for cell in cells:
        folder = directory / "cells" / cell.folder_name
        folder.mkdir(parents=True)
        CellFile.of(cell, lambda source: source.folder_name, 1).write(folder)
        placed[cell.fingerprint] = LocatedCell(cell, folder)
    return placed


def give_product(entry: LocatedCell) -> None:
    """What a pretraining would leave."""
    (entry.folder / "run").mkdir()
    line = {"step": 3, "seconds": 0.5, "tokens": 30, "text_tokens": 27}
    (entry.folder / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
