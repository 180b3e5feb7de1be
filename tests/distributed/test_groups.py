"""Rank discovery, process groups, and the pools of ranks themselves."""

from __future__ import annotations

import os
import time

import pytest
from support.ranks import RankError, run_on_ranks

from pause_megatron.config.schema import ParallelSection
from pause_megatron.distributed import discover, initialize
from pause_megatron.distributed.ranks import first_host
from pause_megatron.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}
TASK = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_launchers_are_distinguished():
    ranks = discover({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"})
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.launcher) == (3, 1, 4, "torchrun")
    assert (ranks.master_addr, ranks.master_port) == ("h", 29500)
    deepspeed = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}
    assert discover(deepspeed, local_rank=1).launcher == "deepspeed"
    assert discover(deepspeed, local_rank=1).local_rank == 1
    alone = discover({})
    assert (alone.rank, alone.world_size, alone.launcher) == (0, 1, "alone")


def test_slurm_step_agrees_on_host_and_port():
    ranks = [discover({**SLURM, "SLURM_PROCID": str(i)}) for i in range(8)]
    assert [r.rank for r in ranks] == list(range(8))
    assert {(r.master_addr, r.master_port, r.world_size, r.launcher) for r in ranks} == {
        ("gpu003", ranks[0].master_port, 8, "slurm")
    }
    assert 10000 <= ranks[0].master_port < 30000
    assert discover({**SLURM, "SLURM_STEP_ID": "1"}).master_port != ranks[0].master_port
    assert discover({**SLURM, "MASTER_ADDR": "chosen", "MASTER_PORT": "7"}).master_addr == "chosen"


def test_a_batch_script_without_srun_is_one_rank():
    batch = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert discover(batch).launcher == "alone"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,12],login1", "gpu003"),
        ("r[1-2]n[04-09]-ib", "r1n04-ib"),
        ("a-b[7]", "a-b7"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "n[1", "[", ","])
def test_first_host_refuses(nodes):
    with pytest.raises(ConfigError, match="node list"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "four"}, "RANK: expected a whole number, got 'four'"),
        ({**TORCHRUN, "RANK": "4"}, "rank < world size"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT: expected a port, 1 to 65535, got 70000"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT: expected a port, 1 to 65535, got 0"),
        ({**SLURM, "MASTER_PORT": "65536"}, "MASTER_PORT: expected a port, 1 to 65535, got 65536"),
        (
            {**TORCHRUN, "SLURM_STEP_NUM_TASKS": "8"},
            r"WORLD_SIZE of at least the 8 tasks of the SLURM job step, got 4\. .* unset them",
        ),
        # Exported in a batch script, where SLURM_PROCID is 0.
        (
            {**TORCHRUN, **TASK, "RANK": "0"},
            r"RANK equal to SLURM_PROCID=3 in a step of 4 tasks .* got 0\. .*unset",
        ),
        (
            {**TORCHRUN, **MPI, "RANK": "0"},
            r"RANK equal to OMPI_COMM_WORLD_RANK=3 in a step of 4 tasks .*, got 0",
        ),
        (
            {**TORCHRUN, **TASK, "LOCAL_RANK": "2"},
            r"expected LOCAL_RANK equal to SLURM_LOCALID=1, .*, got 2",
        ),
    ],
)
def test_bad_environments(environment, message):
    with pytest.raises(ConfigError, match=message):
        discover(environment)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({**TORCHRUN, **TASK}, 3),  # set in the task, to its own numbers
        ({**TORCHRUN, **TASK, "LOCAL_RANK": "0"}, 3),  # the task sees its own GPU alone
        ({**TORCHRUN, **TASK, "RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),  # two processes of a task
        ({**TORCHRUN, **TASK, "RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, 1),  # torchrun in a task of four
        ({**TORCHRUN, **TASK, "RANK": "1", "CROSS_RANK": "1"}, 1),  # deepspeed likewise
        ({**TORCHRUN, **TASK, **MPI, "RANK": "3", "SLURM_PROCID": "0"}, 3),  # mpirun, which srun helps to start
        ({**SLURM, "RANK": "", "WORLD_SIZE": ""}, 5),  # empty is not set
    ],
)
def test_a_rank_beside_a_task_s_number_that_is_right(environment, rank):
    assert discover(environment).rank == rank


def topology(tensor: int) -> tuple:
    import torch.distributed as dist

    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(tensor=tensor), device="cpu") as context:
        mpu = context.mpu
        assert not hasattr(mpu, "initialize_sequence_parallel")
        assert (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()) == (context.tp_rank, tensor)
        assert (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()) == (context.dp_rank, context.dp_size)
        assert mpu.get_data_parallel_group_ranks() == dist.get_process_group_ranks(context.dp_group)
        return (
            context.rank,
            dist.get_process_group_ranks(context.tp_group),
            dist.get_process_group_ranks(context.dp_group),
        )


def test_one_pool_changes_its_topology():
    for tensor in (2, 1, 4, 2):
        for rank, (answer, tp, dp) in enumerate(run_on_ranks(4, topology, tensor)):
            first = rank - rank % tensor
            assert answer == rank
            assert tp == list(range(first, first + tensor))
            assert dp == list(range(rank % tensor, 4, tensor))


def impossible(tensor: int, sequence: bool) -> str:
    from pause_megatron.distributed import initialize

    try:
        initialize(ParallelSection(tensor=tensor, sequence=sequence), device="cpu").close()
    except ConfigError as error:
        return str(error)
    return ""


def test_impossible_splits_are_refused():
    assert all("at most the number of ranks, 2, got 3" in text for text in run_on_ranks(2, impossible, 3, False))
    assert all("a divisor of the number of ranks, 4" in text for text in run_on_ranks(4, impossible, 3, False))
    assert all("parallel.sequence" in text for text in run_on_ranks(2, impossible, 1, True))


def test_a_single_process_starts_and_closes_its_own_world():
    import torch.distributed as dist

    assert not dist.is_initialized()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = [os.environ.get(name) for name in names]
    for _ in range(2):
        with initialize(ParallelSection(), device="cpu") as context:
            assert (context.world_size, context.tp_size, context.dp_size) == (1, 1, 1)
            assert os.environ["WORLD_SIZE"] == "1"
        assert not dist.is_initialized()
        assert [os.environ.get(name) for name in names] == before


def one_rank_fails() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("broken on purpose")


def one_rank_hangs() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(600)


def test_pool_reports_a_remote_exception():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*one_rank_fails.*broken on purpose"):
        run_on_ranks(2, one_rank_fails)
    assert run_on_ranks(2, "builtins:abs", -3) == [3, 3]


def test_pool_reports_where_a_rank_hangs():
    with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 gave no answer.*one_rank_hangs"):
        run_on_ranks(2, one_rank_hangs, timeout=2.0)
    assert run_on_ranks(2, "builtins:abs", -3) == [3, 3]
