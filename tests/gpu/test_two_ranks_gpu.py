"""Two ranks, on two GPUs over NCCL or on a CPU over gloo: data and tensor parallel, one list of losses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import DEVICE, environment, furthest, keys
from support.forked_ranks import metrics

LAYOUTS = {
    "data parallel 2": ["engine.zero_stage=1"],
    "data parallel 2, ZeRO 3": ["engine.zero_stage=3"],
    "tensor parallel 2": ["parallel.tensor=2"],
    "tensor and sequence parallel 2": ["parallel.tensor=2", "parallel.sequence=true"],
}
COMMON = ["pause.window=exact", "pause.placement=uniform"]
GAP = 2e-5


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """Runs of all layouts, one after the other in two processes; and the same in this one."""
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    folder = tmp_path_factory.mktemp("layouts")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--master_port", str(port)]
    command = [sys.executable, "-m", *launcher, __file__, corpus, str(folder), *LAYOUTS]
    two = subprocess.Popen(command, env=environment())
    try:
        main(corpus, str(folder), "alone")
        assert two.wait(130) == 0
    finally:
        two.terminate()
        two.wait()
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_list_of_losses(trained, name, figures):
    found, expected = ([line["loss"] for line in metrics(trained / one)] for one in (name, "alone"))
    gap = furthest(found, expected)
    figures(losses=found, gap=gap)
    figures.line(f"two ranks: {name}: losses within {gap:.1e} of one rank's")
    assert gap < GAP


def main(corpus: str, folder: str, *names: str) -> None:
    """Train in these layouts, one after the other."""
    from pause_megatron.config.load import load
    from pause_megatron.train.pretrain import pretrain

    for name in names:
        overrides = keys(corpus, Path(folder) / name, *COMMON, *LAYOUTS.get(name, []))
        assert pretrain(load(recipe="tiny-pause", overrides=overrides)) == 0


if __name__ == "__main__":
    # One world for all layouts: a launcher's address is good for one meeting.
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    main(*sys.argv[1:])
    dist.destroy_process_group()
