"""The launchers and the README's commands, executed verbatim for a few steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pause_megatron.checkpoint import Manifest, Store
from pause_megatron.cli import VERBS, main, parser_of
from pause_megatron.config.load import dump, load, recipe_names
from pause_megatron.versions import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("cyb", "dit", "every-k", "looped")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def environment() -> dict[str, str]:
    """The environment that the tests run in, seen by the launchers as the one to use."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "NO_SETUP": "1", "OMP_NUM_THREADS": "1"}


def run(command: str, cwd: Path, timeout: float = 540) -> str:
    """Runs a command line as a user types it; returns what it printed."""
    result = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


KEYS = "train.steps=4 checkpoint.every=2 validation.every=2 validation.samples=8 log.samples_every=2"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, str]:
    """`bash launchers/quickstart.sh` over four steps instead of 250."""
    folder = tmp_path_factory.mktemp("quickstart") / "it's [a] folder"
    return folder, run(f"bash launchers/quickstart.sh {shlex.quote(str(folder))} {KEYS}", ROOT)


def test_the_quickstart_writes_the_files_that_it_names(quickstart):
    folder, output = quickstart
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "realised pause rate 10." in output and "realised pause rate 0.00%" in output
    for variant in ("std", "pause"):
        lines = (folder / variant / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        assert Store(folder / variant / "checkpoints").newest_complete()[0].name == "step-00000004"
        assert load(folder / variant / "config.yaml").train.steps == 4
    assert Manifest.load(folder / "pause" / "checkpoints" / "latest").progress["step"] == 4


def test_the_quickstart_ends_with_a_model_that_was_prompted_both_ways(quickstart):
    folder, output = quickstart
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["pause"]["ids"] == [4096]
    assert output.count("\nMy fellow citizens,") == 2
    assert "0 pauses, 40 new tokens" in output and "10 pauses, 40 new tokens" in output
    assert "What to expect: a model of 1.4 M parameters" in output


def test_the_quickstart_prints_no_library_warnings(quickstart):
    """No warnings of libraries, no tracebacks, no NaN losses."""
    _, output = quickstart
    unwanted = re.compile(r"\bnan\b|Warning|WARNING|deprecat|Traceback|hostfile|No CUDA runtime", re.MULTILINE)
    assert [line for line in output.splitlines() if unwanted.search(line)] == []
    assert output.count("note: optim.warmup_steps=1, not 25 (") == 2  # train.steps=4 alone is enough


def test_a_second_quickstart_resumes_and_has_nothing_to_do(quickstart):
    folder, _ = quickstart
    exported = (folder / "model" / "config.json").stat().st_mtime_ns
    output = run(f"bash launchers/quickstart.sh {shlex.quote(str(folder))} {KEYS}", ROOT)
    assert output.count("resuming after step 4") == 2
    assert output.count("complete after step 4") == 2
    assert (folder / "model" / "config.json").stat().st_mtime_ns == exported


def test_sigterm_to_the_quickstart_only_ends_ranks_with_a_checkpoint(tmp_path):
    """Only the script gets SIGTERM. Its ranks save and exit before it does, and the same command resumes."""
    keys = ["train.steps=2000", "checkpoint.every=0", "validation.every=0", "log.tensorboard=false"]
    command = ["bash", "launchers/quickstart.sh", str(tmp_path), *keys]
    metrics = tmp_path / "std" / "metrics.jsonl"

    def stopped_after(step: int) -> tuple[int, str]:
        """Return exit code and output; the ranks exit before the script."""
        with open(tmp_path / "log", "w+") as log:
            script = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            try:
                wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > step, script)
                assert len(ranks_of(tmp_path)) >= 2
                script.send_signal(signal.SIGTERM)
                code = script.wait(60)
                assert ranks_of(tmp_path) == []
                return code, (tmp_path / "log").read_text()
            finally:
                for pid in [*ranks_of(tmp_path), *([script.pid] if script.poll() is None else [])]:
                    os.kill(pid, signal.SIGKILL)

    code, output = stopped_after(2)
    assert code == 75, output[-3000:]
    assert "stopped after step" in output and output.endswith("stopped; the same command resumes\n")
    saved = Store(tmp_path / "std" / "checkpoints").newest_complete()[1].progress["step"]
    assert saved == len(metrics.read_text().splitlines())
    code, output = stopped_after(saved + 1)
    assert code == 75 and f"resuming after step {saved} from" in output
    assert [json.loads(line)["step"] for line in metrics.open()][: saved + 2] == list(range(1, saved + 3))


def ranks_of(folder: Path) -> list[int]:
    """Return launcher and ranks: processes with the folder on their command line, without the script."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, state = (process / "cmdline").read_bytes(), (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if str(folder).encode() in words and b"quickstart.sh" not in words and state[0] not in "ZX":
            found.append(int(process.name))
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 270) -> None:
    """Wait until the condition holds; a process that exits before is an error."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)


def test_tensorboard_shows_losses_rates_configuration_and_pauses(quickstart):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = quickstart
    events = EventAccumulator(str(folder / "pause" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        *("loss/train", "loss/train_after_pause", "loss/train_elsewhere", "perplexity/train", "data/pause_fraction"),
        *("loss/valid", "loss/valid_after_pause", "loss/valid_elsewhere", "loss/valid_without_pauses"),
        *("optimizer/learning_rate", "optimizer/grad_norm", "memory/peak_gib"),
        *("throughput/raw_tokens_per_second", "throughput/text_tokens_per_second"),
    }
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3, 4]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "rate: 0.1" in texts["configuration/text_summary"]
    sample = texts["sample/text_summary"]
    assert sample.count("<pause>") >= 20 and " the " in sample


def test_torchrun_starts_a_run_too(quickstart, tmp_path):
    folder, _ = quickstart
    prefix = shlex.quote(f"data.prefix={json.dumps([f'{folder}/english'])}")
    keys = f"{prefix} run.dir={tmp_path} {KEYS}"
    run(f"torchrun --nproc_per_node 2 -m pause_megatron pretrain --recipe tiny-pause {keys}", ROOT)
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").open()] for path in (folder / "pause", tmp_path)
    ]
    assert losses[0] == losses[1]


PROGRAMS = ("bash", "deepspeed", "pause-megatron", "pip", "pre-commit", "pytest", "python", "sbatch")
PROGRAMS += ("source", "tensorboard")
TOP_PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md")
PAGES = (*TOP_PAGES, *(path for depth in ("*", "*/*", "*/*/*") for path in sorted(ROOT.glob(f"{depth}/README.md"))))


def shell_lines(text: str) -> list[str]:
    """The lines of a page's shell blocks, continued lines joined; comments, VARIABLE=value and srun are cut off."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [block for language, block in found if language in ("", "bash", "sh")]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    commands = [line for line in lines if line and not line.startswith("#")]
    return [re.sub(r"^(\w+=\S* )+|^srun .*?(?=pause-megatron )", "", line) for line in commands]


def commands(text: str) -> list[str]:
    """The commands of a page that this test knows; those with "..." are not whole."""
    return [line for line in shell_lines(text) if line.split()[0] in PROGRAMS and "..." not in line]


def every_command() -> list[str]:
    return list(dict.fromkeys(command for path in PAGES for command in commands(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", TOP_PAGES, ids=lambda path: path.name)
def test_no_command_of_a_top_page_is_left_out(path):
    text = path.read_text(encoding="utf-8")
    assert commands(text) == shell_lines(text) != []


@pytest.mark.parametrize("command", every_command())
def test_every_command_of_the_readmes_is_one_that_exists(command, tmp_path):
    if "RUN/config.yaml" in command:  # of any run
        (tmp_path / "config.yaml").write_text(dump(load(recipe="tiny-pause")))
        command = command.replace("RUN/", f"{tmp_path}/")
    program, *words = shlex.split(command.partition(" > ")[0])
    if program == "pip":
        check_pip(words)
    elif program == "source":
        assert words == [".venv/bin/activate"]  # made by setup.sh
    elif program == "pre-commit":
        assert words in (["install"], ["run", "--all-files"]) and (ROOT / ".pre-commit-config.yaml").is_file()
    elif program == "pytest" or words[:2] == ["-m", "pytest"]:
        check_pytest(words if program == "pytest" else words[2:])
    elif program in ("bash", "python") and words[0] != "-m":
        check_script(words)
    elif program == "python" and words[1] != "pause_megatron":
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file()
    elif program != "tensorboard":
        check_verb(program, words)


def check_pip(words: list[str]) -> None:
    """`pip install -e .`, `-e '.[EXTRA]'` or 'pause-megatron[EXTRA]', of an extra that there is."""
    assert words[0] == "install"
    (requirement,) = (word for word in words[1:] if word != "-e")
    name, extra = re.fullmatch(r"(\.|pause-megatron)(?:\[(\w+)\])?", requirement).groups()
    assert (name == ".") == ("-e" in words) and (extra is None or extra in EXTRAS)


def check_pytest(words: list[str]) -> None:
    """Files and folders of tests that there are, and a marker that is declared."""
    declared = re.findall(r'"(\w+): ', (ROOT / "pyproject.toml").read_text())
    options = {"-m": lambda value: value in declared, "-k": str.isidentifier}
    flags = {"--full", "--update-golden", "-q", "-x"}
    words = iter(words)
    for word in words:
        assert word in flags or (options[word](next(words)) if word in options else (ROOT / word).exists()), word


def check_script(words: list[str]) -> None:
    """The script exists; what follows launchers/test.sh goes to pytest."""
    assert (ROOT / words[0]).is_file()
    if words[0] == "launchers/test.sh":
        check_pytest(words[1:])


def check_verb(program: str, words: list[str]) -> None:
    """A verb's arguments are parsed; a pretraining is also loaded and its batch arithmetic done."""
    if program == "sbatch":
        script = next(word for word in words if word.endswith(".sbatch"))
        assert (ROOT / script).is_file()
        words = [Path(script).stem, *words[words.index(script) + 1 :]]
    elif program in ("deepspeed", "python"):
        words = words[words.index("pause_megatron") + 1 :]
    verb, *arguments = words
    assert verb in VERBS
    if "--help" in arguments:
        return
    parser_of(verb).parse_intermixed_args(arguments)
    if verb == "pretrain":
        # A checkpoint to begin from is read at once, and this one is only an example.
        arguments = [argument for argument in arguments if not argument.startswith(("model.from=", "--dry-run"))]
        assert main([verb, *arguments, "--dry-run"]) == 0


def test_the_readme_and_the_page_of_methods_name_every_recipe():
    methods = (ROOT / "pause_megatron/recipes/METHODS.md").read_text()
    named = r"`((?:tiny|c4|paper|retrofit)(?:-[\w-]+)?)`"
    of_methods = {f"{size}-{method}" for size in ("tiny", "c4-130m", "c4-1b") for method in METHODS}
    pretraining = {name for name in recipe_names() if not name.startswith("finetune-")}
    assert set(re.findall(named, README)) == pretraining - of_methods
    assert all(f"-{method}`" in README for method in METHODS) and of_methods <= set(re.findall(named, methods))
