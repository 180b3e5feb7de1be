"""The verb, the README's own code, and a model folder used by transformers where this project does not exist."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_llama import write_folder

from pause_megatron.cli import main

README = Path(__file__).resolve().parents[2] / "pause_megatron" / "inference" / "README.md"
PROMPT = "My fellow citizens,"

# Importing this project fails, as it does where it is not installed.
WITHOUT_PROJECT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pause_megatron", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("generate") / "out", m_ft=3)


@pytest.fixture
def generate(folder, capsys):
    def call(*arguments):
        code = main(["generate", "--model", str(folder), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_text_streams_and_counts_are_said(generate):
    code, out, err = generate("--prompt", PROMPT, "--pauses", "10", "--max-new-tokens", "6")
    assert code == 0 and out.startswith(PROMPT) and "pause" not in out
    assert "11 prompt tokens, 10 pauses, 6 new tokens; 6 forward passes (1 of them prefill)" in err
    code, _, err = generate("--prompt", PROMPT, "--max-new-tokens", "6")
    assert code == 0 and "pauses: 3 (the model was finetuned with them)" in err


def test_json_names_counts_and_units(generate, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nIn 1862 <pause>\n", encoding="utf-8")
    options = ["--prompts-file", str(file), "--prompt", "A", "--json", "--max-new-tokens", "4", "--temperature", "1"]
    code, out, _ = generate(*options, "--pauses", "5", "--batch-size", "2")
    document = json.loads(out)
    assert code == 0
    assert [item["prompt"] for item in document["completions"]] == ["A", PROMPT, "In 1862 <pause>"]
    assert all(item["pauses"] == 5 and item["new_tokens"] <= 4 for item in document["completions"])
    assert document["completions"][2]["prompt_tokens"] > 8
    assert [batch["prefill_passes"] for batch in document["batches"]] == [1, 1]
    assert set(document["batches"][0]) >= {"forward_passes", "positions", "prefill_seconds", "decode_seconds"}
    _, other, _ = generate(*options, "--pauses", "5", "--batch-size", "3")
    assert json.loads(other)["completions"] == document["completions"]


def test_options_of_pauses_within_answers_reach_the_answers(folder, generate, tmp_path):
    """Every option, and how each is switched off where the model has its own."""
    from pause_megatron.inference import DecodingPauses, load

    own = tmp_path / "own"
    shutil.copytree(folder, own)
    config = json.loads((own / "config.json").read_text())
    config["pause"] |= {"requests": 2, "decoding": {"every": 2, "count": 3, "in_prompt": True}}
    (own / "config.json").write_text(json.dumps(config))
    cases = [
        ("--pause-every 2", {"every": 2}),
        (
            "--pause-after [aeiou] --pause-count 2 --pause-in-prompt",
            {"after": "[aeiou]", "count": 2, "in_prompt": True},
        ),
        ("--pause-entropy 0 --pause-limit 2", {"entropy": 0.0, "limit": 2}),
        ("--pause-requests --pause-limit 3", {"requests": True, "limit": 3}),
        (f"--model {own}", {"every": 2, "count": 3, "in_prompt": True, "requests": True, "limit": 2}),
        (f"--model {own} --pause-every 0 --no-pause-requests", {}),
        (
            f"--model {own} --no-pause-in-prompt --pause-entropy inf",
            {"every": 2, "count": 3, "requests": True, "limit": 2},
        ),
    ]
    generator = load(folder)
    for options, fields in cases:
        code, out, err = generate("--prompt", PROMPT, "--json", "--max-new-tokens", "5", *options.split())
        assert code == 0, err
        (expected,) = generator.generate([PROMPT], max_new_tokens=5, decoding=DecodingPauses(**fields)).completions
        (found,) = json.loads(out)["completions"]
        assert found["text"] == expected.text and found["prompt_pauses"] == expected.prompt_pauses, options
        assert found["answer_pauses"] == [list(place) for place in expected.answer_pauses], options
        assert bool(found["answer_pauses"]) == bool(fields) or fields.get("requests"), options
    config["pause"] = {**config["pause"], "requests": None, "decoding": None, "answer_placement": "scored"}
    (own / "config.json").write_text(json.dumps(config))
    line = "pauses within answers: none; training placed them by scored, which no --pause-* option does"
    for options in ("", " --pause-entropy 0"):
        code, _, err = generate(*f"--prompt A --max-new-tokens 1 --model {own}{options}".split())
        assert code == 0 and (line in err) == (not options)


def test_controls_and_adaptive_pauses(generate):
    for options in (["--filler", "."], ["--location", "prepend"], ["--prefix-attention", "bidirectional"]):
        assert generate("--prompt", PROMPT, "--pauses", "2", "--max-new-tokens", "2", *options)[0] == 0
    code, out, _ = generate(
        "--prompt",
        PROMPT,
        "--pauses",
        "auto",
        "--auto-change",
        "0",
        "--auto-limit",
        "7",
        "--json",
        "--max-new-tokens",
        "1",
    )
    assert code == 0 and json.loads(out)["completions"][0]["pauses"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected a prompt: --prompt TEXT"),
        (["--prompt", "a", "--pauses", "some"], "--pauses: expected a number, 0 or more, or auto, got 'some'"),
        (["--prompt", "a", "--pauses", "400"], "max_position_embeddings"),
        (["--prompt", ""], "prompt 0: expected a non-empty prompt"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file nowhere.txt: cannot be read"),
        (["--prompt", "a", "--model", "nowhere"], "there is no such folder"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size: expected 1 or more"),
        (["--prompt", "a", "--filler", "two words"], "filler: expected the text of one token"),
        (
            ["--prompt", "a", "--pause-count", "2"],
            "--pause-count: expected --pause-every, --pause-after or --pause-ent",
        ),
        (["--prompt", "a", "--pause-limit", "2"], "--pause-limit: expected --pause-entropy or --pause-requests with"),
        (["--prompt", "a", "--pause-in-prompt"], "--pause-in-prompt: expected --pause-every or --pause-after with it"),
    ],
)
def test_errors_are_one_clear_message(generate, options, message):
    code, out, err = generate(*options, *([] if "--pauses" in options else ["--pauses", "0"]))
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_a_prompts_file_that_is_not_utf8(generate, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"good\n\xff\n")
    code, _, err = generate("--prompts-file", str(tmp_path / "prompts.txt"))
    assert code == 2 and "prompts.txt:2: expected UTF-8, got the byte 0xff at 0 of the line" in err


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readmes_commands_are_the_verbs_options(generate, folder, tmp_path, monkeypatch):
    commands = [
        line for block in blocks("") for line in block.splitlines() if line.startswith("pause-megatron generate")
    ]
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").symlink_to(folder)
    (tmp_path / "prompts.txt").write_text("In 1862\n")
    for command in commands:
        words = re.findall(r'"([^"]*)"|(\S+)', command)
        arguments = [quoted or plain for quoted, plain in words][2:]
        code, out, err = generate(*arguments, "--max-new-tokens", "2")
        assert code == 0 and out, err


def test_the_readmes_code_runs(folder, tmp_path, monkeypatch, capsys):
    """In order, in one namespace, as a reader would; code for vLLM, which is not installed here, is only parsed."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "out")
    code = blocks("python")
    assert len(code) == 5
    namespace: dict[str, object] = {}
    for block in code:
        tree = ast.parse(block)
        if "vllm" not in block:
            exec(compile(tree, str(README), "exec"), namespace)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert "My fellow citizens," in capsys.readouterr().out


def test_plain_transformers_without_this_project(folder, tmp_path):
    """The README's lines in a process that cannot import this project give the generator's answer."""
    [code] = [block for block in blocks("python") if "AutoModelForCausalLM" in block]
    script = WITHOUT_PROJECT + code.replace('"out/"', repr(str(folder)))
    script += "\nprint(*output[0].tolist())\nprint([n for n in sys.modules if n.split('.')[0] == 'pause_megatron'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    *text, ids, imported = done.stdout.splitlines()
    from pause_megatron.inference import load

    generator = load(folder)
    completion = generator.generate([PROMPT], pauses=10, max_new_tokens=20).completions[0]
    prompt = generator.encoder.encode(PROMPT)
    produced = [int(token_id) for token_id in ids.split()]
    assert produced[: len(prompt) + 10] == prompt + [600] * 10
    assert tuple(produced[len(prompt) + 10 :][: len(completion.ids)]) == completion.ids
    assert imported == "[]"
    assert "\n".join(text).startswith(PROMPT) and "<pause>" not in "".join(text)
