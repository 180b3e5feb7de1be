"""Partitions, sizes, times and hostfiles: how they are parsed, and which jobs they refuse."""

from __future__ import annotations

import pytest

from pause_megatron.errors import ConfigError
from pause_megatron.slurm.site import (
    Request,
    Share,
    check_hostfile,
    check_partition,
    find_partition,
    megabytes_of,
    parse_partitions,
    seconds_of,
    share_of_node,
)

SINFO = """\
cpu*|(null)|10|infinite|1:00:00|32+|1
gpu|gpu:a100:4(S:0-1),lustre:1|6|2-00:00:00|n/a|64|1024000
gpu|gpu:h100:8|2|2-00:00:00|n/a|224|2048000+
debug|gpu:2|1|30:00|5:00|48|512000
"""
ASKED = {"nodes": 1, "gpus_per_node": 8, "cpus_per_node": 8, "memory_mb": 0, "seconds": None}


def test_partitions():
    known = parse_partitions(SINFO)
    assert [(p.name, p.default, p.gpus, p.nodes, p.limit_seconds, p.default_seconds) for p in known.values()] == [
        ("cpu", True, 0, 10, None, 3600),
        ("gpu", False, 8, 8, 172800, 172800),
        ("debug", False, 2, 1, 1800, 300),
    ]
    # Of the smallest node; SLURM reports 1 MB for a node without configured memory.
    assert [(p.cpus, p.memory_mb) for p in known.values()] == [(32, 0), (64, 1024000), (48, 512000)]


def test_a_job_takes_whole_nodes_or_what_belongs_to_its_gpus():
    known = parse_partitions(SINFO)
    whole = Share(None, "0", True)
    assert share_of_node(known["gpu"], tasks=8, gpus=8) == share_of_node(None, tasks=8, gpus=8) == whole
    assert share_of_node(known["debug"], tasks=2, gpus=2) == whole
    assert share_of_node(known["debug"], tasks=1, gpus=1) == Share(24, "230400M", False)
    assert share_of_node(None, tasks=4, gpus=4) == Share(8, None, False)
    assert share_of_node(known["cpu"], tasks=4, gpus=0) == share_of_node(None, tasks=4, gpus=0)
    assert share_of_node(None, tasks=4, gpus=0) == Share(None, None, False)
    # All GPUs of a node that is shared all the same; part of one that is not.
    assert share_of_node(None, tasks=8, gpus=8, exclusive=False) == Share(8, None, False)
    assert share_of_node(known["debug"], tasks=2, gpus=2, exclusive=False) == Share(24, "460800M", False)
    assert share_of_node(None, tasks=4, gpus=4, exclusive=True) == whole


@pytest.mark.parametrize(("text", "size"), [("0", 0), ("200G", 204800), ("1T", 1048576), ("512", 512), ("2048K", 2)])
def test_sizes(text, size):
    assert megabytes_of(text) == size


def test_a_size_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--mem: expected a size as sbatch takes it"):
        megabytes_of("much")


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("gqu", {}, "expected one of cpu, debug, gpu; got 'gqu'. Did you mean 'gpu'?"),
        (None, {}, "--partition cpu: expected nodes with GPUs"),
        ("debug", {}, "--gpus-per-node: expected at most 2"),
        ("debug", {"gpus_per_node": 2, "nodes": 2}, "--nodes: expected at most 1"),
        ("gpu", {"cpus_per_node": 65}, "--cpus-per-task: expected at most 64 CPUs for the ranks of a node"),
        ("gpu", {"memory_mb": 1024001}, "--mem: expected at most 1024000M in partition gpu, got 1024001M; 0 is all"),
        ("gpu", {"seconds": 172801}, "--time: expected at most 172800 s"),
    ],
)
def test_what_a_partition_does_not_have_is_refused(name, asked, message):
    with pytest.raises(ConfigError) as error:
        check_partition(find_partition(parse_partitions(SINFO), name), Request(**{**ASKED, **asked}))
    assert message in str(error.value)


def test_what_it_has_is_not():
    known = parse_partitions(SINFO)
    most = Request(nodes=8, gpus_per_node=8, cpus_per_node=64, memory_mb=0, seconds=172800)
    check_partition(find_partition(known, "gpu"), most)
    on_cpus = Request(nodes=10, gpus_per_node=0, cpus_per_node=8, memory_mb=10**9, seconds=10**9)
    check_partition(find_partition(known, None), on_cpus)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("1-0", 86400), ("2-12:30", 217800)),
        *(("1-00:00:01", 86401), ("UNLIMITED", None), ("infinite", None)),
    ],
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n1 slots=2\n", "expected 2 hosts with 2 slots each, as the job has, got 1 hosts"),
        ("n1 slots=2\nn2 slots=1\n", "got 2 hosts, n2 with 1"),
        ("n1 slots=2\nn1 slots=2\n", "hostfile:2: expected 'HOST slots=N', each host once"),
        ("n1\n", "hostfile:1: expected 'HOST slots=N'"),
    ],
)
def test_a_hostfile_of_another_allocation_is_refused(tmp_path, content, message):
    path = tmp_path / "hostfile"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        check_hostfile(path, nodes=2, tasks_per_node=2)
    assert message in str(error.value)


def test_a_hostfile_that_agrees(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# ours\nn1 slots=2\n\nn2 slots=2  # the second\n")
    check_hostfile(path, nodes=2, tasks_per_node=2)
    with pytest.raises(ConfigError, match="No such file"):
        check_hostfile(tmp_path / "none", nodes=2, tasks_per_node=2)
