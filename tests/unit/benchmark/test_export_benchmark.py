"""The checkpoint of the export benchmark: written and opened, at a size that takes no time."""

from __future__ import annotations

from benchmarks.export import write_checkpoint

from pause_megatron.hf.checkpoint import open_checkpoint


def test_its_checkpoint_opens(tmp_path):
    sizes = {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 2, "ffn": 8, "tied": True}
    write_checkpoint(tmp_path / "checkpoint", sizes)
    assert open_checkpoint(tmp_path / "checkpoint", lambda *_: None).config.model.hidden == 8
