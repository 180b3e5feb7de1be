"""A run folder without a checkpoint: new, killed before its first save, or one whose checkpoints are gone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pause_megatron.config.load import dump, load
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.run_folder import last_published, record_published
from pause_megatron.train.start.start_over import check_no_lost_checkpoint

RANK_ZERO = SimpleNamespace(rank=0)


@pytest.fixture
def run(tmp_path):
    """Looks at a run folder as a start does, with these keys."""

    def start(*overrides: str) -> None:
        config = load(overrides=["train.steps=100", f"run.dir={tmp_path}", "checkpoint.every=10", *overrides])
        check_no_lost_checkpoint(config, tmp_path / "checkpoints", RANK_ZERO)

    return start


def ran(folder: Path, last: int, *, every: int | None = 10, published: int | None = None) -> bytes:
    """What a run that took so many steps leaves beside its checkpoints."""
    lines = b"".join(json.dumps({"step": step}).encode() + b"\n" for step in range(1, last + 1))
    (folder / "metrics.jsonl").write_bytes(lines)
    if every is not None:
        (folder / "config.yaml").write_text(dump(load(overrides=["train.steps=100", f"checkpoint.every={every}"])))
    if published is not None:
        record_published(folder / "checkpoints", published)
    return lines


def test_a_new_run_begins(run, tmp_path):
    run()
    (tmp_path / "checkpoints").mkdir()
    run()
    run("run.start_over=true")
    assert not list(tmp_path.glob("*.before-*"))


@pytest.mark.parametrize(
    ("last", "every", "published"),
    [
        *[(0, 10, None), (1, 10, None), (10, 10, None), (80, 100, None), (100, 0, None), (3, None, None)],
        *[(80, 10, 0), (100, 0, 0)],  # checkpoint.every was made smaller since; or a save failed
    ],
)
def test_a_run_killed_before_its_first_checkpoint_restarts(run, tmp_path, last, every, published):
    """The line of step 10 is written before the checkpoint of step 10."""
    ran(tmp_path, last, every=every, published=published)
    run()
    assert last_published(tmp_path / "checkpoints") == 0


@pytest.mark.parametrize(
    ("last", "every", "published", "lost"),
    [(11, 10, None, 10), (35, 10, None, 30), (30, None, None, 20), (3, 10, 2, 2), (0, 10, 50, 50), (100, 0, 100, 100)],
)
def test_a_run_whose_checkpoints_are_gone_is_refused(run, tmp_path, last, every, published, lost):
    lines = ran(tmp_path, last, every=every, published=published)
    with pytest.raises(CheckpointError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path}/checkpoints: expected the checkpoint of step {lost} or a later one, got none"
    )
    assert (f"metrics.jsonl goes up to step {last}" if last else ".checkpoints.json has it") in message
    assert "Restore the checkpoints" in message and "run.start_over=true" in message
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


def test_starting_over_keeps_what_was_there(run, tmp_path):
    kept = []
    for last in (30, 40, 50):  # within one second
        kept.append(ran(tmp_path, last, published=last))
        (tmp_path / "tensorboard").mkdir()
        run("run.start_over=true")
        assert not (tmp_path / "metrics.jsonl").exists() and last_published(tmp_path / "checkpoints") == 0
    assert sorted(path.read_bytes() for path in tmp_path.glob("metrics.before-*.jsonl")) == sorted(kept)
    assert len(list(tmp_path.glob("tensorboard.before-*"))) == 3
    run()  # killed before its first checkpoint: begins again by itself


@pytest.mark.parametrize("start_over", ["true", "false"])
def test_something_else_in_the_place_of_the_folder_is_named(run, tmp_path, start_over):
    ran(tmp_path, 30)
    place = tmp_path / "checkpoints"
    place.symlink_to(tmp_path / "not mounted")
    with pytest.raises(CheckpointError, match=r"expected a folder, got a link to .*not mounted, which is no folder"):
        run(f"run.start_over={start_over}")
    place.unlink()
    place.write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints: expected a folder, got a file\. Restore the folder"):
        run(f"run.start_over={start_over}")
    assert (tmp_path / "metrics.jsonl").exists()


def test_metrics_or_a_marker_that_cannot_be_read_do_not_end_in_a_traceback(run, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    record = tmp_path / ".checkpoints.json"
    for content in (b"", b"\xff", b"[" * 100_000, b"17", *(b'{"published": %s}' % x for x in (b'"3"', b"-1", b"true"))):
        record.write_bytes(content)
        run()
    record.unlink()
    record.mkdir()
    run()


def test_an_extension_does_not_start_over(run, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.extended_from=50: expected the checkpoint of step 50"):
        run("train.extended_from=50", "run.start_over=true")
    lines = ran(tmp_path, 50, published=50)
    with pytest.raises(
        CheckpointError, match=r"of step 50 .*set run\.start_over=true train\.extended_from=null to start"
    ):
        run("train.extended_from=50", "run.start_over=true")
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
