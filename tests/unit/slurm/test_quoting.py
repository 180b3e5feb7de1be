"""Values of job options arrive unchanged or are refused; none is executed as a command."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pause_megatron.cli import main
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.slurm import JobOptions, render
from pause_megatron.slurm.quoting import directive, further_line, job_name, words_of_line
from pause_megatron.slurm.script import LAUNCHERS, TrainingJob, render_training

# What shells, sbatch and file systems give a meaning to, often; and any other character.
MEANINGS = "'\"\\$`;&|<>#%@ \n\r\t\0*?~!(){}[]=,:-a\u2028\x85"
EVIL = st.text(st.one_of(st.sampled_from(MEANINGS), st.characters()), max_size=12)

# In place of SLURM's commands and of python: each writes its arguments, with zero bytes between, to a file.
PRINTER = """#!/bin/sh
case $(basename "$0") in
scontrol) echo node1 ;;
squeue) echo RUNNING ;;
srun) for word; do printf '%s\\0' "$word"; done >>"$PRINTED"
    while [ $# -gt 0 ] && [ "$1" != bash ] && [ "$1" != python ] && [ "$1" != apptainer ]; do shift; done
    [ "$1" != bash ] || exec "$@" ;;
*) for word; do printf '%s\\0' "$word"; done >>"$PRINTED" ;;
esac
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder whose programs print their arguments; nothing else is on PATH but the system's."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "squeue", "scancel", "python", "apptainer", "deepspeed"):
        (folder / "bin" / name).write_text(PRINTER)
        (folder / "bin" / name).chmod(0o755)
    return folder


def executed(script: str, site: Path) -> list[str]:
    """What the programs of a script are given, when bash runs it."""
    printed = site / "printed"
    printed.unlink(missing_ok=True)
    work = site / "work"
    work.mkdir(exist_ok=True)
    environment = {"PATH": f"{site}/bin:{os.environ['PATH']}", "PRINTED": str(printed), "SLURM_JOB_ID": "7"}
    environment |= {
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NAME": "x",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
    }
    done = subprocess.run(["bash"], input=script.encode(), cwd=work, env=environment, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert [path.name for path in work.iterdir()] == ["logs"], "a command of the user's text ran"
    return printed.read_bytes().decode().split("\0")


def directives(script: str) -> list[list[str]]:
    """The words of each `#SBATCH` line."""
    lines = [line.removeprefix("#SBATCH ") for line in script.split("\n") if line.startswith("#SBATCH ")]
    return [list(words_of_line(line, "line")) for line in lines]


@given(text=EVIL)
@settings(max_examples=500)
def test_a_directive_comes_back_as_it_was_or_is_refused(text):
    for name, made in (("x", directive), ("job-name", lambda name, value: directive(name, job_name(value)))):
        try:
            line = made(name, text)
        except ConfigError as error:
            assert "expected" in str(error) and "\n" not in str(error)
            continue
        assert "\n" not in line and list(words_of_line(line, "x")) == [f"--{name}={text}"]


def test_a_name_that_is_too_long_for_a_file_is_refused():
    """SLURM ends the job then, and leaves no log: its name has the job's number, too."""
    assert job_name("a" * 200) == "a" * 200
    for name in ("a" * 201, "\u00e9" * 101):
        with pytest.raises(ConfigError, match=r"--name: expected a name of at most 200 bytes, .*, got 20[12]: "):
            job_name(name)
        with pytest.raises(ConfigError, match="--sbatch: expected a name of at most 200 bytes"):
            further_line(f"--job-name={name}")


@pytest.mark.parametrize("launcher", LAUNCHERS)
@given(name=EVIL, partition=EVIL, image=EVIL, argument=EVIL, line=EVIL)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_script_gives_its_programs_what_the_user_wrote(launcher, site, name, partition, image, argument, line):
    """Each option alone may be refused; what is not is in one script together."""
    offered = {"name": name, "partition": partition, "arguments": (argument,), "lines": (f"--comment={line}",)}
    offered["container"] = None if launcher == "deepspeed" else f"apptainer:{image}"
    taken = {}
    for option, value in offered.items():
        try:
            render_training(TrainingJob("pretrain", **{"arguments": (), option: value}, launcher=launcher))
        except ConfigError as error:
            assert "expected" in str(error) and "\n" not in str(error)
            continue
        taken[option] = value
    script = render_training(TrainingJob("pretrain", **{"arguments": (), **taken}, launcher=launcher))
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    found = directives(script)
    if taken.get("name"):
        assert [f"--job-name={name}"] in found
    if taken.get("partition"):
        assert [f"--partition={partition}"] in found
    words = executed(script, site)
    if "arguments" in taken:
        assert argument in words
    if taken.get("container"):
        assert image in words
    assert "pretrain" in words


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_image_with_blanks_and_quotes_is_one_word(launcher, site):
    image = '/images/it\'s a "b" $(touch broken).sif'
    job = TrainingJob("pretrain", ("a=b c",), launcher=launcher, container=f"apptainer:{image}")
    words = executed(render_training(job), site)
    assert image in words and "a=b c" in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a\ntouch /tmp/x"], "--name: expected one line of text without control characters, got 'a\\ntouch"),
        (["--name", "a/b"], "--name: expected a name without /, as files are named by it"),
        (["--partition", "a\nb"], "--partition"),
        (["--sbatch=--qos=a\nrm x"], "--sbatch: expected one line of text"),
        (["--sbatch", "qos=high"], "--sbatch: expected an option of sbatch, such as --qos=high, got 'qos=high'"),
        (["--sbatch=--comment='a"], "--sbatch: expected each quote to be closed"),
        (["--sbatch=--comment=hetjob"], "--sbatch: expected no 'hetjob' or 'packjob', which sbatch erases"),
        (["--container", "pyxis:a\nb"], "--container: expected a path"),
        (["--container", "apptainer:--writable"], "--container: expected an image, got '--writable'"),
        (["finetune.filler=a\nb"], "argument 'finetune.filler': expected one line of text without control"),
    ],
)
def test_what_cannot_be_written_is_refused_by_its_option(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "error" in line]
    assert message in line


@given(folder=EVIL.filter(lambda text: "\0" not in text and text not in ("", ".", "..") and "/" not in text), time=EVIL)
@settings(max_examples=60)
def test_a_cell_s_script_too(folder, time):
    try:
        script = render(Path("/tmp") / folder / "cell", "pretrain", 2, JobOptions(time=time))
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    found = directives(script)
    assert [f"--time={time}"] in found
    assert [f"--output=/tmp/{folder}/cell/job.txt".replace("%", "%%")] in found
    (line,) = [line for line in script.split("\n") if "experiment cell" in line]
    assert shlex.split(line.removesuffix(" &"))[-1] == f"/tmp/{folder}/cell"


def test_a_further_line_is_as_it_was():
    line = "--qos=high --comment='two words' -A \"x y\" # why"
    assert further_line(line) == line
    assert list(words_of_line(line, "")) == ["--qos=high", "--comment=two words", "-A", "x y"]
