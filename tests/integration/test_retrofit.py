"""Retrofit: only pause rows are trained, everything else is bit-identical; and LoRA on an exported folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_config import tiny_model

from pause_megatron.checkpoint import MergedReader
from pause_megatron.checkpoint.format import ADAM_STATE
from pause_megatron.checkpoint.layout import VOCABULARY
from pause_megatron.checkpoint.store import open_newest
from pause_megatron.config.load import load, load_saved
from pause_megatron.config.lora import LORA_A, LORA_B
from pause_megatron.errors import CheckpointError, ConfigError
from pause_megatron.hf.adapter import export_adapter, load_with_peft
from pause_megatron.hf.export import export
from pause_megatron.hf.parity import load_with_transformers
from pause_megatron.megatron_lm.export import export_megatron
from pause_megatron.megatron_lm.importing import import_megatron


def pretrain(corpus: str, folder: str, tensor: int, zero: int, extra: list[str]) -> int:
    from pause_megatron.train.pretrain import pretrain

    return pretrain(
        load(
            overrides=[
                *(f"data.prefix={corpus}", f"run.dir={folder}", f"engine.zero_stage={zero}"),
                *("data.sequence_length=64", "data.split=90,10,0", "batch.global_size=4", "batch.micro_size=1"),
                *("optim.schedule=constant", "optim.lr=0.01", "optim.warmup_steps=0", "optim.weight_decay=0.5"),
                *("train.steps=4", "engine.precision=fp32", "pause.rate=0.2", "checkpoint.every=0"),
                *("validation.every=4", "validation.samples=4", "log.tensorboard=false", f"parallel.tensor={tensor}"),
                *extra,
            ]
        )
    )


@pytest.fixture(scope="module")
def bases(corpus, tmp_path_factory) -> dict[str, Path]:
    """Runs without pauses, of one rank, with tied and untied matrices; two pause rows that they never saw.

    A layer of the tied model is looped.
    """
    sizes = [*tiny_model(layers=2, hidden=32, heads=4, kv_heads=2)]
    found = {}
    for name, tied, loops in (("tied", "true", 2), ("untied", "false", 1)):
        found[name] = tmp_path_factory.mktemp("base") / name
        settings = [*sizes, f"model.tied={tied}", f"model.loops={loops}", "pause.rate=0", "pause.embeddings=2"]
        settings += ["model.loop_layers=1..1"] if loops > 1 else []
        run_on_ranks(1, pretrain, corpus, str(found[name]), 1, 1, settings)
    return found


def changed_rows(before: Path, after: Path) -> dict[str, list[int]]:
    """For each parameter that differs in a bit, the rows that do."""
    one, two = MergedReader(open_newest(before).folder), MergedReader(open_newest(after).folder)
    found = {}
    for name in one.manifest.parameters:
        rows = min(one.shape(name)[0], two.shape(name)[0])  # vocabularies are padded by tensor-parallel size
        differs = (one.rows(name, 0, rows) != two.rows(name, 0, rows)).view(rows, -1).any(dim=1)
        if differs.any():
            found[name] = differs.nonzero().flatten().tolist()
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "tensor", "zero", "extra"),
    [
        ("untied", 1, 1, 0, []),
        ("tied", 2, 1, 1, []),
        ("untied", 2, 2, 2, ["parallel.sequence=true"]),
        ("tied", 2, 1, 3, ["parallel.recompute=full"]),
        ("untied", 2, 2, 3, []),
        ("tied", 2, 2, 0, ["engine.precision=bf16"]),
        ("untied", 2, 1, 2, ["engine.precision=bf16"]),
    ],
)
def test_only_pause_rows_move(bases, corpus, tmp_path, kind, ranks, tensor, zero, extra):
    settings = [f"model.from={bases[kind]}", "pause.embeddings=2", "train.only=pause_rows", *extra]
    run_on_ranks(ranks, pretrain, corpus, str(tmp_path / "run"), tensor, zero, settings)
    text_size = 1000
    matrices = VOCABULARY if kind == "untied" else VOCABULARY[:1]
    assert changed_rows(bases[kind], tmp_path / "run") == {name: [text_size, text_size + 1] for name in matrices}


def test_the_second_stage_trains_everything_from_there(bases, corpus, tmp_path):
    first, second = str(tmp_path / "rows"), str(tmp_path / "all")
    settings = ["pause.embeddings=2"]
    run_on_ranks(
        2, pretrain, corpus, first, 1, 2, [f"model.from={bases['untied']}", "train.only=pause_rows", *settings]
    )
    looped = ["model.loops=2", "model.loop_layers=1..1"]  # plain weights retrofitted with a loop
    run_on_ranks(2, pretrain, corpus, second, 2, 1, [f"model.from={first}", *settings, *looped])
    assert load_saved(open_newest(second).folder / "config.yaml").model.depth == 3
    changed = changed_rows(Path(first), Path(second))
    assert len(changed) == len(MergedReader(open_newest(first).folder).manifest.parameters)
    losses = [json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1]) for run in (first, second)]
    assert losses[1]["valid_loss"] < losses[0]["valid_loss"]
    done = export(second, tmp_path / "out")
    assert f"`{first}`" in (done.folder / "README.md").read_text()


def test_what_is_trained_cannot_change_in_a_run(bases, corpus, tmp_path):
    settings = [f"model.from={bases['untied']}", "pause.embeddings=2"]
    run_on_ranks(
        1, pretrain, corpus, str(tmp_path / "run"), 1, 1, [*settings, "train.only=pause_rows", "train.steps=2"]
    )
    with pytest.raises(CheckpointError, match=r"train\.only: 'pause_rows' in the checkpoint, None in this run"):
        pretrain(corpus, str(tmp_path / "run"), 1, 1, [*settings, "train.steps=2"])
    for only in ("lora", "pause_rows"):
        with pytest.raises(ConfigError, match=rf"train\.only={only}: expected model\.from"):
            pretrain(corpus, str(tmp_path / "new"), 1, 1, [*tiny_model(), f"train.only={only}"])


def test_lora_through_peft_on_an_exported_folder(bases, tmp_path):
    """Steps of an adapter on prompt + pauses + answer; the base stays, and pauses still work after merging."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(bases["untied"], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    settings = peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=16, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    prompt = tokenizer("The state of the union is" + "<pause>" * 5, return_tensors="pt")
    answer = tokenizer(" strong, fellow citizens", add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = answer if answer[0, 0] != tokenizer.pad_token_id else answer[:, 1:]
    inputs = torch.cat([prompt["input_ids"], answer], dim=1)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], dim=1)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = adapted(input_ids=inputs, labels=labels).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    for name, value in adapted.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        assert "lora" in name or torch.equal(value, frozen[plain]), name

    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=False).eval()
    assert again.config.pause["ids"] == model.config.pause["ids"]
    output = again.generate(**prompt, max_new_tokens=8, do_sample=False)
    new = output[0, prompt["input_ids"].shape[1] :]
    assert not set(new.tolist()) & set(again.config.pause["ids"])  # suppressed still
    plain = again.generate(
        **tokenizer("The state of the union is", return_tensors="pt"), max_new_tokens=8, do_sample=False
    )
    with torch.no_grad():
        after_pauses = again(**prompt).logits[0, -1]
        at_once = again(**tokenizer("The state of the union is", return_tensors="pt")).logits[0, -1]
    assert not torch.allclose(after_pauses, at_once, atol=1e-3)  # the pauses are seen
    assert "<pause>" not in tokenizer.decode(plain[0], skip_special_tokens=True)


def check_adapter_and_merged_export(base: Path, run: Path, folder: Path) -> None:
    """The base with peft's adapter, the merged export and the native model compute the same logits."""
    export(base, folder / "base")
    merged = export(run, folder / "merged")
    with pytest.raises(CheckpointError, match=r"no config\.json; write it first: pause-megatron export-hf"):
        export_adapter(run, folder / "adapter", base=folder / "nothing")
    adapter = export_adapter(run, folder / "adapter", base=folder / "base")
    for done in (merged, adapter):  # of the native model
        assert done.parity.largest_difference <= done.parity.tolerance
    ids = torch.arange(980, 1002)[None]
    with torch.no_grad():
        first, second = (
            model(ids).logits
            for model in (
                load_with_transformers(folder / "merged"),
                load_with_peft(folder / "base", folder / "adapter"),
            )
        )
        untrained = load_with_transformers(folder / "base")(ids).logits
    assert (first - second).abs().max() <= 1e-5 * max(1.0, float(first.abs().max()))
    assert (first - untrained).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "ranks", "tensor", "zero", "extra"),
    [
        ("untied", 1, 1, 0, ["lora.layers=1", "lora.targets=[qkv,fc2]"]),
        ("tied", 2, 2, 3, ["parallel.sequence=true", "parallel.recompute=full"]),
        ("tied", 2, 1, 2, ["engine.precision=bf16"]),
        ("untied", 2, 2, 1, ["pause.positions=shared"]),
    ],
)
def test_only_adapters_and_pause_rows_move(bases, corpus, tmp_path, kind, ranks, tensor, zero, extra):
    settings = [f"model.from={bases[kind]}", "pause.embeddings=2", "train.only=lora", "lora.rank=4", *extra]
    run_on_ranks(ranks, pretrain, corpus, str(tmp_path / "run"), tensor, zero, settings)
    matrices = VOCABULARY if kind == "untied" else VOCABULARY[:1]
    assert changed_rows(bases[kind], tmp_path / "run") == {name: [1000, 1001] for name in matrices}
    stored = MergedReader(open_newest(tmp_path / "run").folder)
    added = stored.manifest.parameters.keys() - MergedReader(open_newest(bases[kind]).folder).manifest.parameters.keys()
    assert len(added) == (4 if "lora.layers=1" in extra else 16)
    assert all(stored.rows(name, 0, stored.shape(name)[0]).any() for name in added)  # B was 0
    check_adapter_and_merged_export(bases[kind], tmp_path / "run", tmp_path)
    told = "model.config.pause |= {'positions': 'shared'}" in (tmp_path / "adapter" / "README.md").read_text()
    assert told == ("pause.positions=shared" in extra)


def test_adapters_resume_bit_for_bit_and_at_another_tensor_parallel_size(bases, corpus, tmp_path):
    """From step 2 of 4; logits of the exports are checked."""
    settings = [f"model.from={bases['untied']}", "pause.embeddings=2", "train.only=lora"]
    settings += ["lora.rank=4", "checkpoint.every=2", "engine.kernels=plain"]
    run_on_ranks(2, pretrain, corpus, str(tmp_path / "run"), 1, 2, settings)
    states = {}
    for name, ranks, tensor, zero in (("same", 2, 1, 2), ("other", 2, 2, 3)):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "run", folder, symlinks=True)
        shutil.rmtree(folder / "checkpoints/step-00000004")
        run_on_ranks(ranks, pretrain, corpus, str(folder), tensor, zero, settings)
        states[name] = open_newest(folder).folder
        assert states[name].name == "step-00000004"
    whole = MergedReader(open_newest(tmp_path / "run").folder)
    same, other = MergedReader(states["same"]), MergedReader(states["other"])
    for name in whole.manifest.parameters:
        rows = min(reader.shape(name)[0] for reader in (whole, other))
        for key in ADAM_STATE:
            one = whole.rows(name, 0, rows, key)
            assert torch.equal(one, same.rows(name, 0, rows, key)), (name, key)
            assert torch.allclose(one, other.rows(name, 0, rows, key), rtol=1e-3, atol=1e-4), (name, key)
    check_adapter_and_merged_export(bases["untied"], states["other"], tmp_path)
    with pytest.raises(
        CheckpointError, match=r"merged: expected the fp32 export .* \(pause-megatron export-hf .*differ"
    ):
        export_adapter(states["other"], tmp_path / "wrong", base=tmp_path / "merged")
    assert not (tmp_path / "wrong").exists()


def test_a_run_from_a_run_with_adapters_starts_from_the_merged_weights(bases, corpus, tmp_path):
    """So does an export to Megatron-LM."""
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    lora = ["train.only=lora", "lora.rank=4", "lora.alpha=64", "pause.embeddings=2"]
    run_on_ranks(2, pretrain, corpus, first, 2, 1, [f"model.from={bases['untied']}", *lora])
    again = [f"model.from={first}", *lora, "lora.layers=0", "lora.targets=proj,fc1"]
    run_on_ranks(1, pretrain, corpus, second, 1, 0, again)
    run_on_ranks(2, pretrain, corpus, third, 2, 3, [f"model.from={first}", "train.only=pause_rows", *lora[3:]])
    with pytest.raises(CheckpointError, match="--optimizer: expected a run without LoRA adapters"):
        export_megatron(first, tmp_path / "megatron", optimizer=True)
    export_megatron(first, tmp_path / "megatron")
    fourth = tmp_path / "fourth"
    import_megatron(tmp_path / "megatron", fourth, tokenizer=tmp_path / "megatron" / "tokenizer")
    merged = MergedReader(open_newest(first).folder, adapter_scale=16.0)
    stored = MergedReader(open_newest(first).folder)
    for run, adapters in ((second, 4), (third, 0), (fourth, 0)):
        reader = MergedReader(open_newest(run).folder)
        assert sum("lora" in name for name in reader.manifest.parameters) == adapters
        for name in merged.manifest.parameters:
            if name not in VOCABULARY and "lora" not in name:
                rows = merged.shape(name)[0]
                expected = merged.rows(name, 0, rows)
                assert torch.equal(reader.rows(name, 0, rows), expected), name
                if "linear" in name:
                    low, high = (stored.rows(n, 0, stored.shape(n)[0]) for n in adapter_of(name))
                    product = stored.rows(name, 0, rows) + 16 * high @ low
                    assert torch.allclose(expected, product, atol=1e-6)
                    assert not torch.allclose(expected, stored.rows(name, 0, rows), atol=1e-3)


def adapter_of(name: str) -> list[str]:
    return [f"{name.removesuffix('weight')}{kind}" for kind in (LORA_A, LORA_B)]


def test_an_adapter_needs_a_run_with_adapters_and_its_base(bases, tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a run with train\.only=lora for --adapter, got train\.only=n"):
        export_adapter(bases["untied"], tmp_path / "out", base=tmp_path)
    assert not (tmp_path / "out").exists()
