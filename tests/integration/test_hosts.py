"""Two hosts with an address each: rendezvous, wrong addresses, and a lost host."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forked_ranks import _context, run_config, start
from support.namespaces import Host, NoNamespaces, mount_over, two_hosts

from pause_megatron.config.load import dump
from pause_megatron.config.schema import RunConfig
from pause_megatron.train.guards.watch import EXIT_HUNG

STEPS, COMPARED = 3000, 20
BEAT = 0.3
Hosts = tuple[Host, Host]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    making = two_hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made = making.__enter__()
    except NoNamespaces as why:
        pytest.skip(f"two hosts on this machine: {why}")
    yield made
    making.__exit__(None, None, None)


def config_of(corpus: str, folder: Path, **run: int) -> RunConfig:
    config = run_config(corpus, folder, 1)
    changes = {
        "run": config.run.model_copy(update=run),
        "train": config.train.model_copy(update={"steps": STEPS, "tokens": None}),
        "checkpoint": config.checkpoint.model_copy(update={"every": 0}),
        "validation": config.validation.model_copy(update={"every": 0}),
    }
    return config.model_copy(update=changes)


def on_host(host: Host, environment: dict[str, str], arguments: list[str], output: Path) -> None:
    """In a process of its own: the program, or another one if it has a path."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    host.enter()
    os.environ.update(environment)
    if arguments[0] == sys.executable:
        os.execv(sys.executable, arguments)
    from pause_megatron.cli import main

    raise SystemExit(main(arguments))


def started(host: Host, environment: dict[str, str], arguments: list[str], output: Path) -> multiprocessing.Process:
    process = _context.Process(target=on_host, args=(host, environment, arguments, output))
    process.start()
    return process


def ranks_on(hosts: Hosts, address: str, config: RunConfig, folder: Path, **environment: str) -> list[tuple]:
    """Start one rank per host, all with the same MASTER_ADDR; return (process, log)."""
    file = folder / "given.yaml"
    file.write_text(dump(config), encoding="utf-8")
    found = []
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address}
        log = folder / f"{host.name}.log"
        given = {**place, "MASTER_PORT": "29500", **environment}
        found.append((started(host, given, ["pretrain", "--config", str(file)], log), log))
    return found


def first_losses(folder: Path, found: list[tuple]) -> list[float]:
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < COMPARED:
        running = all(process.is_alive() for process, _ in found)
        assert running and time.monotonic() < deadline, "\n".join(log.read_text()[-3000:] for _, log in found)
        time.sleep(0.02)
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()[:COMPARED]]


def end(processes) -> None:
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def losses_of_one_host(corpus, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("one-host")
    processes = start(config_of(corpus, folder), folder / "log")
    losses = first_losses(folder, [(process, folder / "log") for process in processes])
    end(processes)
    return losses


def test_two_hosts_give_the_losses_of_one_and_a_lost_host_is_detected(hosts, corpus, losses_of_one_host, tmp_path):
    seconds = 5
    file = tmp_path / "given.yaml"
    file.write_text(dump(config_of(corpus, tmp_path, hang_seconds=seconds)), encoding="utf-8")
    found = []
    for host in hosts:
        command = [sys.executable, "-m", "pause_megatron.distributed.torchrun", "--nnodes=2", "--nproc-per-node=1"]
        command += [f"--rdzv-endpoint={hosts[0].address}:29400", "--rdzv-backend=c10d", "--rdzv-id=1"]
        # torchrun compares the endpoint with the addresses of the host's name, which here is not the one that is meant.
        command += [f"--rdzv-conf=is_host={int(host is hosts[0])}"]
        command += [f"--local-addr={host.address}", "-m", "pause_megatron", "pretrain", "--config", str(file)]
        log = tmp_path / f"{host.name}.log"
        found.append((started(host, {"GLOO_SOCKET_IFNAME": "live0"}, command, log), log))
    assert first_losses(tmp_path, found) == losses_of_one_host
    hosts[1].vanish()
    vanished = time.monotonic()
    process, log = found[0]
    process.join(60)
    text = log.read_text()
    end(other for other, _ in found[1:])
    hosts[1].appear()
    assert process.exitcode == EXIT_HUNG, text
    assert time.monotonic() - vanished < 4 * seconds
    assert re.search(rf"\[rank \d on host-a\] nothing for {seconds} s \(run.hang_seconds\), last: step", text), text
    assert re.search(r"training\.py.* in train\n", text), text  # where it waits


@pytest.mark.slow
def test_losing_the_host_of_rank_0_and_the_store_ends_the_other_host(hosts, corpus, tmp_path):
    config = config_of(corpus, tmp_path, hang_seconds=5)
    found = ranks_on(hosts, hosts[0].address, config, tmp_path, GLOO_SOCKET_IFNAME="live0")
    first_losses(tmp_path, found)
    hosts[0].vanish()
    (first, _), (second, log) = found
    second.join(60)
    end([first])
    hosts[0].appear()
    assert second.exitcode == EXIT_HUNG, log.read_text()
    assert re.search(r"training\.py.* in train\n", log.read_text())


def test_an_unreachable_address_is_an_error_that_names_the_variable(hosts, corpus, tmp_path):
    found = ranks_on(hosts, hosts[0].address, config_of(corpus, tmp_path, connect_seconds=5), tmp_path)
    for process, log in found:
        process.join(60)
        text = log.read_text()
        assert process.exitcode == 2, text
        assert "gloo: expected every rank to reach the next; set GLOO_SOCKET_IFNAME to the interface that joins" in text
        assert re.search(
            r"rank 1 on host-b: no answer from rank 0 on host-a at 10\.99\.1\.1 \(dead0, the address of the host name "
            r"host-a\): .*; rank 1 on host-b has lo 127\.0\.0\.1, dead0 10\.99\.2\.1, live0 10\.77\.0\.2, "
            r"rank 0 on host-a has .*; MASTER_ADDR=10\.77\.0\.1 is reached by live0\n",
            text,
        ), text


def rendezvous_for_nccl(host: Host, rank: int, output: Path) -> None:
    """NCCL's interface, as far as it is known without a GPU, is looked at in the same way."""
    from pause_megatron.distributed.ranks import discover
    from pause_megatron.distributed.rendezvous import rendezvous

    host.enter()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="10.77.0.1", MASTER_PORT="29501")
    with output.open("w") as file:
        os.dup2(file.fileno(), 2)
    rendezvous(discover(), "nccl", 5)


@pytest.mark.slow
def test_for_nccl_it_is_a_warning_and_the_start_continues(hosts, tmp_path):
    logs = [tmp_path / host.name for host in hosts]
    processes = [
        _context.Process(target=rendezvous_for_nccl, args=(host, rank, logs[rank])) for rank, host in enumerate(hosts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    texts = [log.read_text() for log in logs]
    assert [process.exitcode for process in processes] == [0, 0], texts
    assert "warning: nccl: expected every rank to reach the next; set NCCL_SOCKET_IFNAME" in texts[0]
    assert "10.99.2.1 (dead0, the first that NCCL finds)" in texts[0] and "warning: nccl" not in texts[1]


def test_a_silent_master_address_is_an_error_after_connect_seconds(hosts, corpus, tmp_path):
    found = ranks_on(hosts, hosts[0].dead_address, config_of(corpus, tmp_path, connect_seconds=3), tmp_path)
    for process, log in found:
        process.join(60)
        assert process.exitcode == 2, log.read_text()
    texts = [log.read_text() for _, log in found]
    assert "MASTER_ADDR=10.99.1.1 (10.99.1.1), port 29500: expected rank 0 to answer within 3 s (run.conn" in texts[1]
    assert "expected 2 ranks within 3 s (run.connect_seconds) at MASTER_ADDR=10.99.1.1, port 29" in texts[0]
    assert "; got rank 1 missing: see the other ranks' output" in texts[0]


def hold(host: Host, folder: Path, output: Path, lock: Path | None) -> None:
    """Owns a run folder until it is killed. `lock`: what stands for the folder's lock on this host."""
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize
    from pause_megatron.errors import ConfigError
    from pause_megatron.terminal.log import log_to_stderr
    from pause_megatron.train.guards.ownership import own_run

    with output.open("a") as file:
        os.dup2(file.fileno(), 2)
    host.enter()
    if lock is not None:
        mount_over(folder / ".lock", lock)
    try:
        with log_to_stderr(timestamps=False), initialize(ParallelSection()) as context, own_run(folder, context, BEAT):
            output.with_suffix(".owns").touch()
            time.sleep(600)
    except ConfigError as error:
        output.write_text(str(error))


def test_a_run_folder_has_one_owner_across_hosts_until_it_exits(hosts, tmp_path):
    """Each host sees only its own locks, as on Lustre with localflock: a local file replaces the lock."""
    folder, lock = tmp_path / "run", tmp_path / "lock"
    folder.mkdir()
    (folder / ".lock").touch()
    lock.touch()

    def started_on(host: Host, name: str, lock: Path | None) -> multiprocessing.Process:
        process = _context.Process(target=hold, args=(host, folder, tmp_path / name, lock))
        process.start()
        return process

    def wait_for(path: Path) -> None:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, [p.read_text() for p in tmp_path.iterdir() if p.is_file()]
            time.sleep(0.02)

    first = started_on(hosts[0], "first", None)
    wait_for(tmp_path / "first.owns")
    second = started_on(hosts[1], "second", lock)
    second.join(60)
    assert f"held by process {first.pid} on host-a, since" in (tmp_path / "second").read_text()
    end([first])
    third = started_on(hosts[1], "third", lock)
    wait_for(tmp_path / "third.owns")
    owner = json.loads((folder / ".owner.json").read_text())
    end([third])
    assert (owner["host"], owner["process"]) == ("host-b", third.pid)
    text = (tmp_path / "third").read_text()
    assert f"stale lock of process {first.pid} on host-a" in text and "waiting 1 s for a heartbeat" in text
    assert re.search(
        rf"no heartbeat from process {first.pid} on host-a, since .* for \d s: taking over the lock", text
    ), text
