"""A corpus made by the program itself, once a session: real speeches -> C4 shards -> tokenizer -> .bin/.idx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.slurm_cluster import Cluster, slurm_cluster

from pause_megatron.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of C4-layout shards of real English."""
    folder = tmp_path_factory.mktemp("shards")
    script = ROOT / "launchers" / "english_shards.py"
    subprocess.run([sys.executable, script, "--output", folder, "--shards", "8"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def corpus(shards: Path) -> str:
    """Prefix of a prepared corpus of one of the shards; a vocabulary of 1000, so that models stay small."""
    one = str(next(iter(sorted(shards.glob("c4-train.*")))))
    tokenizer, prefix = str(shards / "tokenizer.model"), str(shards / "english")
    assert main(["train-tokenizer", "--input", one, "--vocab-size", "1000", "--output", tokenizer]) == 0
    assert main(["prepare", "--input", one, "--tokenizer", tokenizer, "--output", prefix]) == 0
    return prefix


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real SLURM cluster of two nodes on this machine."""
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
