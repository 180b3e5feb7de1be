"""The verb on records of the tasks: one answer four ways, kill -9, bad input."""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model
from support.tiny_llama import write_folder

from pause_megatron.cli import main
from pause_megatron.cli.evaluate import add_arguments
from pause_megatron.evaluate import read_results, read_samples
from pause_megatron.tasks import load_task, read_examples

README = Path(__file__).resolve().parents[2] / "pause_megatron" / "evaluate" / "README.md"
TASKS_README = README.parents[1] / "tasks" / "README.md"
COUNTS = (0, 1, 10)
NEW_TOKENS, RECORDS = 8, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with random weights and 256 positions."""
    return write_folder(tmp_path_factory.mktemp("evaluate") / "out", m_ft=3)


@pytest.fixture
def evaluate(folder, task_records, tmp_path, capsys):
    """Runs the verb on the tasks' records; its output folder is tmp_path/results."""

    def call(*arguments: str):
        given = ["--model", str(folder), "--task-path", str(task_records), "--output", str(tmp_path / "results")]
        code = main(["evaluate", *given, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_and_files_are_what_the_verb_takes():
    lines = [line for line in README.read_text().splitlines() if line.startswith("pause-megatron ")]
    assert len(lines) == 2
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for line in lines:
        assert parser.parse_args(shlex.split(line)[2:]).output == "results/"
    for code in blocks("python"):
        ast.parse(code)
    [task] = blocks("yaml")
    assert yaml.safe_load(task)["doc_to_text"] == "Question: {{goal}}\nAnswer:"


def test_tasks_and_numbers_of_pauses_in_one_call(evaluate, tmp_path, monkeypatch, capsys):
    code, out, err = evaluate("--tasks", "squad,piqa,lambada", "--pauses", "0,2", "--limit", "5", "--batch-size", "4")
    assert code == 0, err
    assert out.splitlines()[0].split() == [
        *("task", "metric", "M", "value", "95", "%", "interval", "+-", "s.e.", "n", "groups")
    ]
    assert "prompts cut from the left to fit the model: squad M=0: 5, squad M=2: 5" in out
    entries = read_results(tmp_path / "results")
    assert {(entry.task, entry.pauses) for entry in entries if entry.primary} == {
        (task, count) for task in ("squad", "piqa", "lambada") for count in (0, 2)
    }
    assert {entry.n for entry in entries} == {5} and len({entry.model for entry in entries}) == 1
    assert len({(entry.task, entry.data) for entry in entries}) == 3
    for entry in entries:
        samples = read_samples(tmp_path / "results" / "samples" / f"{entry.task}-m{entry.pauses}-append-seed0.jsonl")
        scores = [sample.scores[entry.metric] for sample in samples.values()]
        assert entry.value == pytest.approx(sum(scores) / 5)
        assert entry.tokens.pauses == 5 * entry.pauses and entry.forward_passes > 0
    code, out, err = evaluate("--tasks", "piqa", "--limit", "5", "--filler", ".", "--location", "prepend")
    assert code == 0 and "pauses: 3 (the model was finetuned with them)" in err
    assert len(read_results(tmp_path / "results")) == len(entries) + len(load_task("piqa").metrics)
    monkeypatch.chdir(tmp_path)
    [statistics] = [code for code in blocks("python") if "paired_bootstrap" in code]
    exec(compile(statistics, str(README), "exec"), {})
    assert "n=5, resamples=10000, seed=0," in capsys.readouterr().out


def test_the_held_out_part_of_train_is_scored_beside_the_evaluation_split(evaluate, task_records, tmp_path):
    options = ["--tasks", "squad", "--pauses", "0", "--limit", "3"]
    assert evaluate(*options)[0] == 0
    code, _, err = evaluate(*options, "--split", "held-out", "--held-out", "0.2")
    assert code == 0, err
    entries = [entry for entry in read_results(tmp_path / "results") if entry.primary]
    assert [entry.split for entry in entries] == ["eval", "held-out"]
    samples = read_samples(tmp_path / "results" / "samples" / "squad-m0-append-held-out-seed0.jsonl")
    path = str(task_records / "squad")
    train = {example.id: example.group for example in read_examples(load_task("squad"), "train", path, held_out=0.2)}
    assert samples and not train.keys() & samples.keys()
    assert not set(train.values()) & {sample.group for sample in samples.values()}


def test_a_killed_evaluation_resumes(evaluate, folder, task_records, tmp_path, capsys):
    """kill -9 in the middle of the second setting: no record is scored twice, none is lost, the results are equal."""
    options = ["--tasks", "lambada", "--pauses", "0,2", "--limit", "40", "--batch-size", "2"]
    given = ["--model", str(folder), "--task-path", str(task_records), "--output", str(tmp_path / "results")]
    process = subprocess.Popen([sys.executable, "-m", "pause_megatron", "evaluate", *given, *options])
    samples = tmp_path / "results" / "samples"
    first, second = (samples / f"lambada-m{count}-append-seed0.jsonl" for count in (0, 2))
    deadline = time.monotonic() + 240
    while not (second.exists() and second.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.read_bytes() for path in (first, second)}
    whole = before[second][: before[second].rfind(b"\n") + 1].count(b'"batch"') * 2
    assert 0 < whole < 40
    code, _, err = evaluate(*options)
    assert code == 0
    assert "lambada M=0: 40 records, 40 of them from an earlier run" in err
    assert f"lambada M=2: 40 records, {whole} of them from an earlier run" in err
    assert first.read_bytes() == before[first] and second.read_bytes().startswith(before[second].rsplit(b"\n", 1)[0])

    assert main(["evaluate", *given[:-1], str(tmp_path / "other"), *options]) == 0
    for one in (first, second):
        assert timeless(read_samples(one)) == timeless(read_samples(tmp_path / "other" / "samples" / one.name))
    assert timeless(read_results(tmp_path / "results")) == timeless(read_results(tmp_path / "other"))


def timeless(found):
    """As JSON, without measured times."""
    found = found.as_json() if hasattr(found, "as_json") else found
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key != "seconds"}
    return [timeless(item) for item in found] if isinstance(found, list) else found


def test_a_task_of_ones_own_by_its_documentation_alone(folder, tmp_path, monkeypatch, capsys):
    """The files of tasks/README.md as they are written there, and its commands."""
    text = TASKS_README.read_text(encoding="utf-8")
    data = tmp_path / "data" / "quiz"
    data.mkdir(parents=True)
    [records] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(records)
    for name in re.findall(r"^```\w+\n# (\w+\.\w+)$", text, re.MULTILINE):
        [content] = re.findall(rf"^```\w+\n(# {re.escape(name)}\n.*?)^```", text, re.MULTILINE | re.DOTALL)
        (tmp_path / name).write_text(content)
    commands = re.findall(r"^pause-megatron (evaluate .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for command in commands:
        words = shlex.split(command.replace("--limit 100", "--limit 3"))
        assert main([str(folder) if word == "out/" else word for word in words]) == 0, capsys.readouterr().err
    entries = [entry for entry in read_results("results") if entry.task == "quiz"]
    assert {(entry.metric, entry.pauses) for entry in entries} == {
        (metric, count) for metric in ("exact_match", "my_metrics:starts_right") for count in (0, 10)
    }
    assert {(entry.few_shot, entry.n) for entry in entries} == {(2, 4)}
    identity = json.loads(Path("results/samples/quiz-m10-append-seed0.json").read_text())
    assert list(identity["decoding"]["code"]) == ["my_metrics:starts_right"]

    (tmp_path / "my_metrics.py").write_text("def starts_right(prediction, references):\n    return 0.5\n")
    words = [str(folder) if word == "out/" else word for word in shlex.split(commands[0])]
    assert main(words) == 2
    message = (
        r"decoding\.code\.my_metrics:starts_right: expected .* \(this run\), got .*: the results are from a different"
    )
    assert re.search(message, capsys.readouterr().err)
    assert main([*words[:-1], "anew"]) == 0
    assert {entry.value for entry in read_results("anew") if entry.metric.startswith("my_")} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "gsm9k"], "got 'gsm9k'. Did you mean 'gsm8k'?"),
        (["--tasks", "lm_eval/piqaa"], "expected a task of lm-eval or --include-path, got 'piqaa'"),
        (["--tasks", "piqa", "--pauses", "2,some"], "--pauses: expected numbers, 0 or more, with commas between them"),
        (["--tasks", "piqa", "--pauses", "-1"], "--pauses: expected numbers, 0 or more"),
        (["--tasks", "piqa", "--pauses", "300"], "max_position_embeddings"),
        (["--tasks", "piqa", "--batch-size", "0"], "--batch-size: expected a number, 1 or more, got '0'"),
        (["--tasks", "piqa", "--limit", "0"], "--limit: expected a number, 1 or more, got '0'"),
        (
            ["--tasks", "piqa", "--split", "held-out", "--held-out", "1"],
            "--held-out: expected a number above 0 and below 1, got '1'",
        ),
        (["--tasks", "lm_eval/piqa", "--split", "held-out"], "lm_eval tasks: expected --split eval, got held-out"),
        (["--tasks", "piqa", "--seed", "x"], "--seed: expected a number, 0 or more, got 'x'"),
        (
            ["--tasks", "piqa", "--task-path", "nowhere"],
            "--task-path nowhere: expected the folder piqa with the records of piqa, got none",
        ),
        (
            ["--tasks", "piqa", "--model", "nowhere", "--task-path", "nowhere"],  # first: records may be downloaded
            "model 'nowhere': expected a folder as export-hf writes it",
        ),
        (["--tasks", "lm_eval/piqa", "--prefix-attention", "bidirectional"], "expected --prefix-attention causal"),
        (["--tasks", "piqa", "--filler", "two words"], "filler: expected the text of one token"),
        (
            ["--tasks", "piqa", "--include-path", "nowhere", "--tasks", "lm_eval/piqa"],
            "--include-path nowhere: expected",
        ),
    ],
)
def test_errors_are_one_clear_message_before_the_model_runs(evaluate, tmp_path, options, message):
    code, out, err = evaluate("--limit", "3", *options)
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "results" / "samples").exists()


def test_results_of_something_else_are_refused(evaluate, folder, tmp_path):
    assert evaluate("--tasks", "piqa", "--limit", "3")[0] == 0
    code, _, err = evaluate("--tasks", "piqa", "--limit", "4")
    assert code == 2 and "results.json: data: expected 'xxh3_128:" in err and "give another --output" in err
    other = write_folder(tmp_path / "other", seed=1)
    code, _, err = evaluate("--tasks", "lambada", "--limit", "3", "--model", str(other))
    assert code == 2 and "results.json: model: expected xxh3_128:" in err and f"({folder})" in err
    [samples] = (tmp_path / "results" / "samples").glob("*.jsonl")
    lines = samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    code, _, err = evaluate("--tasks", "piqa", "--limit", "3")
    assert code == 2 and f"{samples.name}: line 2: damaged" in err


def test_without_lm_eval_the_rest_works_and_its_tasks_say_what_to_install(folder, task_records, tmp_path):
    """In a process where it cannot be imported."""
    script = "import sys; sys.modules['lm_eval'] = None\nfrom pause_megatron.cli import main\nprint(main(sys.argv[1:]))"
    given = ["evaluate", "--model", str(folder), "--task-path", str(task_records), "--limit", "2", "--pauses", "1"]
    script += "\nprint(main([*sys.argv[1:-1], 'lm_eval/piqa']))"
    command = [sys.executable, "-c", script, *given, "--output", str(tmp_path / "results"), "--tasks", "piqa"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split()[-2:] == ["0", "2"], done.stderr
    assert "pip install 'pause-megatron[evaluate]'" in done.stderr and "Traceback" not in done.stderr


# One answer four ways.


def train(corpus: str, folder: str) -> None:
    """A small model that has read some real text, with two pauses that take turns."""
    from pause_megatron.config.load import load
    from pause_megatron.train.pretrain import pretrain

    sizes = [*tiny_model(layers=2, hidden=64, heads=4, kv_heads=2)]
    batches = ["data.sequence_length=256", "data.split=90,10,0", "batch.global_size=4", "batch.micro_size=4"]
    steps = ["train.steps=30", "optim.lr=0.01", "optim.schedule=constant", "engine.precision=fp32"]
    others = ["pause.embeddings=2", "checkpoint.every=0", "log.tensorboard=false", "model.init_std=0.1"]
    where = [f"data.prefix={corpus}", f"run.dir={folder}"]
    assert pretrain(load(overrides=[*where, *sizes, *batches, *steps, *others])) == 0


def native(
    folder: str, prompts: list[list[int]], choices: list[list[list[int]]]
) -> list[tuple[list[int], list[float]]]:
    """Greedy answers and log-likelihoods by the checkpoint's own model: no cache, no batch, no transformers."""
    from pause_megatron.checkpoint import CheckpointReader, restore_weights
    from pause_megatron.checkpoint.store import open_newest
    from pause_megatron.config.load import load
    from pause_megatron.distributed import initialize
    from pause_megatron.train.pretrain import corpus_data
    from pause_megatron.train.run import new_model

    config = load(str(Path(folder) / "config.yaml"))
    with initialize(config.parallel) as context:
        model = new_model(config, corpus_data(config, context.world_size))
        restore_weights(model, CheckpointReader(open_newest(folder).folder, context.tp_rank))
        model.eval()
        pauses = list(model.vocabulary.pause_ids)

        def logits(ids: list[int]) -> torch.Tensor:
            with torch.no_grad():
                found = model.logits(torch.tensor([ids]), torch.arange(len(ids))[None])[0].float().clone()
            found[:, pauses] = float("-inf")
            return found

        answers = []
        for prompt, options in zip(prompts, choices, strict=True):
            ids = list(prompt)
            for _ in range(NEW_TOKENS):
                ids.append(int(logits(ids)[-1].argmax()))
            sums = []
            for option in options:
                rows = logits(prompt + option)[len(prompt) - 1 : -1].log_softmax(-1)
                sums.append(float(rows[range(len(option)), option].double().sum()))
            answers.append((ids[len(prompt) :], sums))
        return answers


@pytest.fixture(scope="module")
def trained(corpus, task_records, tmp_path_factory) -> tuple[Path, Path]:
    """A run, and its export."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run_on_ranks(1, train, corpus, str(run))
    assert main(["export-hf", str(run), str(run.parent / "out")]) == 0
    return run, run.parent / "out"


def write_tasks(root: Path, records: list[dict]) -> None:
    """The same questions as a task of ours and as two of lm-eval's."""
    records_file = root / "reading" / "test.jsonl.gz"
    records_file.parent.mkdir(parents=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    records_file.write_bytes(gzip.compress(content))
    (root / "reading.yaml").write_text(
        'kind: generate\ndataset: {path: none}\nsplits: {eval: test}\nprompt: "Question: {goal}\\nAnswer:"\n'
        "choices: [sol1, sol2]\ngold: label\nmetrics: [exact_match, choice_accuracy]\nprimary: exact_match\n"
        f"decoding: {{max_new_tokens: {NEW_TOKENS}}}\n"
    )
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {records_file}}}, cache_dir: {root / 'cache'}}}\n"
    )
    data += 'test_split: test\ndoc_to_text: "Question: {{goal}}\\nAnswer:"\nmetadata: {version: 1}\n'
    (root / "choice.yaml").write_text(
        f"task: reading_choice\n{data}output_type: multiple_choice\ndoc_to_choice: '{{{{[sol1, sol2]}}}}'\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    (root / "decode.yaml").write_text(
        f"task: reading_decode\n{data}output_type: generate_until\ndoc_to_target: sol1\n"
        f"generation_kwargs: {{until: [], max_gen_toks: {NEW_TOKENS}, do_sample: false}}\n"
        "metric_list: [{metric: exact_match}]\n"
    )


def test_one_answer_four_ways(trained, task_records, tmp_path, monkeypatch, capsys):
    """Natively, by this verb, by transformers alone, and through lm-eval: the same words and log-likelihoods."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, out = trained
    lines = (task_records / "piqa" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[10 : 10 + RECORDS]]
    write_tasks(tmp_path, records)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tasks = f"{tmp_path / 'reading.yaml'},lm_eval/reading_choice,lm_eval/reading_decode"
    given = ["--task-path", str(tmp_path), "--include-path", str(tmp_path), "--pauses", ",".join(map(str, COUNTS))]
    results = tmp_path / "results"
    assert main(["evaluate", "--model", str(out), "--tasks", tasks, *given, "--output", str(results)]) == 0
    capsys.readouterr()

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    prompts = [f"Question: {record['goal']}\nAnswer:" for record in records]
    options = [[f" {record['sol1']}", f" {record['sol2']}"] for record in records]
    rows, wanted = [], []
    for count in COUNTS:
        pauses = "".join(("<pause>", "<pause_1>")[index % 2] for index in range(count))
        for prompt, texts in zip(prompts, options, strict=True):
            rows.append(tokenizer(prompt + pauses)["input_ids"])
            wanted.append([tokenizer(prompt + pauses + text)["input_ids"][len(rows[-1]) :] for text in texts])
    answers = iter(run_on_ranks(1, native, str(run), rows, wanted)[0])
    said = set()
    for count in COUNTS:
        name = f"-m{count}-append-seed0.jsonl"
        ours = read_samples(results / "samples" / f"reading{name}")
        chosen = read_samples(results / "samples" / f"lm_eval.reading_choice{name}")
        decoded = read_samples(results / "samples" / f"lm_eval.reading_decode{name}")
        for index in range(RECORDS):
            ids, sums = next(answers)
            at = COUNTS.index(count) * RECORDS + index
            inputs = torch.tensor([rows[at]])
            mask = torch.ones_like(inputs)
            output = model.generate(inputs, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert output[0, inputs.shape[1] :].tolist() == ids
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert ours[str(index + 1)].prediction == text
            assert decoded[f"reading_decode/{index}"].prediction[0].strip() == text
            likelihoods = [by_transformers(model, rows[at], option) for option in wanted[at]]
            assert likelihoods == pytest.approx(sums, abs=1e-4)
            assert ours[str(index + 1)].log_likelihoods == pytest.approx(sums, abs=1e-4)
            assert [value for value, _ in chosen[f"reading_choice/{index}"].prediction] == pytest.approx(sums, abs=1e-4)
            said.add((text, *sums))
    assert len(said) == RECORDS * len(COUNTS)  # every number of pauses was heard
    assert not list((results / "lm_eval").iterdir())
    before = read_results(results)
    assert main(["evaluate", "--model", str(out), "--tasks", tasks, *given, "--output", str(results)]) == 0
    assert read_results(results) == before  # seconds too: nothing was asked again


def by_transformers(model, prompt: list[int], option: list[int]) -> float:
    """Log-likelihood by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + option])).logits[0].float()
    logits[:, model.config.pause["ids"]] = float("-inf")
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(rows[range(len(option)), option].double().sum())
