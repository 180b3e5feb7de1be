"""Standard streams on real pipes without a reader, full devices, closed descriptors and narrow encodings."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pause_megatron import cli
from pause_megatron.errors import OutputError
from pause_megatron.terminal.output import StandardStream, lost_output, standard_streams, tolerant_output

ROOT = Path(__file__).resolve().parents[3]


def without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def full_device() -> io.TextIOWrapper:
    return open("/dev/full", "w", buffering=1)


def closed() -> io.TextIOWrapper:
    with open(os.devnull, "w") as stream:
        pass
    return stream


def of_a_closed_descriptor() -> io.TextIOWrapper:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    stream = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.close(descriptor)
    return stream


@pytest.fixture
def _restored():
    """Buffers of these streams are dropped here, not when the tests' own process ends."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
    yield
    for name, stream in before.items():
        setattr(sys, name, stream)


BROKEN = {
    "Broken pipe": without_reader,
    "No space left on device": full_device,
    "ValueError: I/O operation on closed file.": closed,
    "Bad file descriptor": of_a_closed_descriptor,
}


@pytest.mark.parametrize(("why", "make"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_failed_write_is_counted_for_messages_and_raised_for_results(why, make):
    talk = StandardStream(make(), "standard error", required=False)
    print("a line", file=talk, flush=True)
    talk.writelines(["two\n", "lines\n"])
    assert talk.failed >= 3 and talk.describe() == f"standard error: {talk.failed} writes failed ({why})"
    result = StandardStream(make(), "standard output", required=True)
    with pytest.raises(OutputError, match=r"^standard output: expected a place to write to: ") as raised:
        print("a line", file=result, flush=True)
    assert raised.value.reader_gone == (make is without_reader)
    with pytest.raises(OutputError):  # also after the first was caught
        result.flush()


def test_a_wrapped_stream_is_otherwise_unchanged(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        stream = StandardStream(file, "standard output", required=True)
        assert (stream.isatty(), stream.encoding, stream.fileno()) == (False, "ascii", file.fileno())
        assert stream.buffer is file.buffer
        assert print("loss \u2013 5 \U0001f600", file=stream) is None and stream.failed == 0
        assert stream.write("é") == 1
    assert (tmp_path / "out").read_text() == "loss \\u2013 5 \\U0001f600\n\\xe9"


@pytest.mark.usefixtures("_restored")
def test_streams_are_wrapped_once_and_restored(monkeypatch):
    for name in ("stdout", "stderr", "__stderr__"):
        monkeypatch.setattr(sys, name, full_device())
    before = sys.stdout, sys.stderr, sys.__stderr__
    with standard_streams() as stdout, tolerant_output():
        assert sys.stdout is stdout and not stdout.required
        print("x", flush=True)
        for stream in (sys.stderr, sys.__stderr__):  # hang detection writes to the second
            print("x", file=stream, flush=True)
        assert [line.split(":")[0] for line in lost_output()] == ["standard output", "standard error"]
    assert (sys.stdout, sys.stderr, sys.__stderr__) == before and lost_output() == []


PROGRAM = """
import sys
from pause_megatron.terminal.output import lost_output, tolerant_output
with tolerant_output():
    for number in range(3000):
        print("to standard output", number)
        print("to standard error", number, file=sys.stderr)
    open(sys.argv[1], "w").write("\\n".join(lost_output()))
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("where", "broken"),
    [(">/dev/full", 1), ("2>/dev/full", 1), (">&-", 1), ("2>&-", 1), (">&- 2>&- <&-", 2), ("2>&1 | true", 2)],
)
def test_a_program_keeps_its_exit_code_and_writes_to_no_other_file(tmp_path, where, broken):
    (tmp_path / "program.py").write_text(PROGRAM)
    # The file is opened after the start: with a closed descriptor it would be number 1 or 2.
    script = f'cd {tmp_path}; "{sys.executable}" program.py said {where}; echo ${{PIPESTATUS[0]}} >code'
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (tmp_path / "code").read_text() == "75\n"
    assert b"Exception ignored" not in done.stderr and b"Traceback" not in done.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == broken and all("writes failed (" in line for line in said)


RESULTS = [
    ["--help"],
    ["--version"],
    *([verb, "--help"] for verb in cli.VERBS),
    ["pretrain", "--print-config"],
    ["finetune", "--recipe", "finetune-gsm8k", "--print-config"],
    ["pretrain", "--recipe", "paper-1b", "--dry-run"],
    ["plan", "--recipe", "c4-1b-pause"],
    ["experiment", "run", "--recipe", "tiny", "--dry-run"],
]


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("arguments", RESULTS, ids=" ".join)
def test_a_closed_pipe_ends_quietly_and_a_full_device_is_an_error(arguments, monkeypatch, capfd):
    for make, code in ((without_reader, cli.EXIT_READER_GONE), (full_device, cli.EXIT_ERROR)):
        stream = make()
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(arguments) == code
        said = capfd.readouterr().err.splitlines()
        said = [line for line in said if "note" not in line and "data.prefix is not given" not in line]
        expected = "pause-megatron: error: standard output: expected a place to write to: No space left on device"
        assert said == ([expected] if make is full_device else [])


def test_messages_do_not_wait_for_a_reader_that_hangs(monkeypatch):
    monkeypatch.setattr("pause_megatron.terminal.output._STALL_SECONDS", 0.05)
    reader, writer = os.pipe()
    stream = StandardStream(os.fdopen(writer, "w", buffering=1), "standard error", required=False)
    for _ in range(100):
        stream.write("x" * 1023 + "\n")
    assert "its reader is stalled" in stream.describe()
    fitted = os.read(reader, 1 << 20)
    assert len(fitted) >= 1 << 15 and len(fitted) % 1024 == 0  # whole lines
    stream.write("again\n")
    assert os.read(reader, 100) == b"again\n"
