"""Every family of transformers x import, logits, round trip, tensor parallelism, pretraining, export, generation.

A model of each family has the options that set it apart. Its weights are drawn by transformers, norms and biases too,
so that an exchange of any two shows. Ranks of one pool compute the logits of all families in one call.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.prose import documents, train_hugging_face
from support.ranks import run_on_ranks
from support.tiny_config import tiny_config

from pause_megatron.checkpoint import Manifest
from pause_megatron.config.families import FAMILIES, layer_tensors
from pause_megatron.config.load import load
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.hf.export import Exported, export
from pause_megatron.hf.importing import Imported, import_folder

LENGTH, POSITIONS = 96, 128
SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "initializer_range": 0.1},
    **{"bos_token_id": None, "pad_token_id": None},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# By family: what config.json says beside the sizes, and the same as keys of `model:`.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
        {
            **{"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 32},
            **{"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
        },
    ),
    "mistral": ({"sliding_window": 24, "head_dim": 16}, {"sliding_window": 24, "head_dim": 16}),
    "qwen3": (
        {"head_dim": 16, "tie_word_embeddings": True, "rope_scaling": YARN},
        {
            **{"head_dim": 16, "tied": True, "qk_norm": "head", "family": "qwen3"},
            **{"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 32},
        },
    ),
    "olmo2": (
        {"rope_theta": 5e5, "rms_norm_eps": 1e-6},
        {"qk_norm": "whole", "norm": "post", "rope_base": 5e5, "norm_eps": 1e-6},
    ),
    "qwen2": (
        {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {"kv_heads": 1, "qkv_bias": True, "sliding_window": 24, "sliding_from": 1},
    ),
}


NO_WINDOW = {"sliding_window": None, "sliding_from": 0}


@dataclass
class Case:
    """A family's model on its way: the source, what import and export returned, and logits by tensor-parallel size."""

    family: str
    source: Path
    imported: Imported
    exported: Exported
    logits: dict[int, list[torch.Tensor]] = field(default_factory=dict)


def write_model(folder: Path, family: str, tokenizer: Path, dtype: torch.dtype, **options: Any) -> Path:
    """A folder as the Hub has it: a real model with random weights, and a byte-level tokenizer."""
    import transformers

    name = FAMILIES[family].architecture.removesuffix("ForCausalLM")
    native = load_tokenizer(tokenizer)
    ids = {"vocab_size": native.vocab_size, "eos_token_id": native.eod}
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ids, **options})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + ("norm" in label))
    model.to(dtype).save_pretrained(str(folder), max_shard_size="60KB")
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train_hugging_face(tmp_path_factory.mktemp("tokenizer") / "byte-level")


@pytest.fixture(scope="module")
def windows(tokenizer) -> list[torch.Tensor]:
    """Windows of real sentences, without pauses and with runs of them; longer than windows and original lengths."""
    native = load_tokenizer(tokenizer)
    text = [index for document in documents(8) for index in native.encode(document)]
    pause = native.vocab_size
    plain = torch.tensor(text[:LENGTH])
    paused = torch.tensor(text[LENGTH : 2 * LENGTH])
    paused[torch.arange(LENGTH) % 12 < 3] = pause
    return [plain, paused]


@pytest.fixture(scope="module")
def cases(tokenizer, windows, tmp_path_factory) -> dict[str, Case]:
    """Every family imported for four ranks and exported again; the logits of its checkpoint at 1, 2 and 4 ranks."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for family, (options, _) in OPTIONS.items():
        source = write_model(folder / family / "hf", family, tokenizer, torch.float32, **options)
        imported = import_folder(source, folder / family / "native", tensor_parallel=4)
        found[family] = Case(family, source, imported, export(imported.folder, folder / family / "out"))
    checkpoints = [str(case.imported.folder) for case in found.values()]
    for ranks in (1, 2, 4):
        computed = run_on_ranks(ranks, native_logits, checkpoints, windows, ranks)[0]
        for case, logits in zip(found.values(), computed, strict=True):
            case.logits[ranks] = logits
    return found


def native_logits(checkpoints: list[str], windows: list[torch.Tensor], tensor: int) -> list[list[torch.Tensor]]:
    """Logits of each checkpoint on each window, by the native model at this tensor-parallel size."""
    from pause_megatron.checkpoint import load_weights
    from pause_megatron.config.schema import ParallelSection
    from pause_megatron.distributed import initialize
    from pause_megatron.hf.checkpoint import open_checkpoint
    from pause_megatron.model import build_model

    parallel, found = ParallelSection(tensor=tensor), []
    with initialize(parallel) as context:
        for checkpoint in (open_checkpoint(path, lambda *_: None) for path in checkpoints):
            model = build_model(
                checkpoint.config.model,
                vocabulary=checkpoint.vocabulary,
                sequence_length=POSITIONS,
                parallel=parallel,
                precision="fp32",
                draw=False,
            )
            rows = checkpoint.vocabulary.size
            load_weights(model, checkpoint.reader, live_rows=rows, rank=context.tp_rank, ranks=tensor)
            with torch.no_grad():
                positions = torch.arange(LENGTH)[None]
                found.append([model.eval().logits(window[None], positions)[0].clone() for window in windows])
    return found


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Largest difference, as a fraction of the largest logit, or of 1 if that is smaller."""
    return float((one - two).abs().max()) / max(1.0, float(two.abs().max()))


def test_every_family_has_a_case_with_its_options():
    assert OPTIONS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", OPTIONS)
def test_import(cases, family):
    """The import compared logits itself, to 1e-5; the checkpoint has the options as keys."""
    case = cases[family]
    assert case.imported.family == family and case.imported.how == "grown vocabulary"
    assert Manifest.load(case.imported.folder).tensor_parallel == 4
    model = load(case.imported.folder / "config.yaml").model
    expected = {"kv_heads": 2, "family": family, "layers": 3, **OPTIONS[family][1]}
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", OPTIONS)
def test_logits(cases, windows, family, ranks):
    """Those of transformers, at each tensor parallelism, also where ranks share a key/value head."""
    case = cases[family]
    plain, paused = case.logits[ranks]
    with torch.no_grad():
        source = loaded(case.source)(windows[0][None]).logits[0]
        exported = loaded(case.exported.folder)(windows[1][None]).logits[0]
    assert distance(plain[:, : source.shape[1]], source) <= 1e-5
    assert distance(paused, exported) <= 1e-5


@pytest.mark.parametrize("family", OPTIONS)
def test_the_options_matter(cases, windows, family):
    """Without them the logits differ by far more than is allowed: the comparison would see it."""
    case, config = cases[family], json.loads((cases[family].source / "config.json").read_text())
    off: dict[str, dict[str, Any]] = {
        "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "mistral": {"sliding_window": None},
        "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "qwen2": {"use_sliding_window": False, "layer_types": None, "sliding_window": None},
    }
    from transformers import AutoConfig, AutoModelForCausalLM

    changed = AutoConfig.for_model(**(config | off[family]))
    other = AutoModelForCausalLM.from_config(changed, dtype=torch.float32).eval()
    other.load_state_dict(loaded(case.source).state_dict())
    with torch.no_grad():
        logits = other(windows[0][None]).logits[0]
    assert distance(logits, case.logits[1][0][:, : logits.shape[1]]) > 1e-2


@pytest.mark.parametrize("family", OPTIONS)
def test_round_trip(cases, family):
    """Every tensor bit for bit, and the same class; the embedding has the pause row behind its own."""
    case = cases[family]
    before, after = tensors(case.source), tensors(case.exported.folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name
    config = json.loads((case.exported.folder / "config.json").read_text())
    original = json.loads((case.source / "config.json").read_text())
    assert config["architectures"] == original["architectures"]
    card = (case.exported.folder / "README.md").read_text()
    assert f"A plain {FAMILIES[family].title} model" in card
    said = {"llama": "Llama 3", "mistral": "sliding window of 24", "qwen3": "YaRN", "olmo2": "all heads together"}
    assert said.get(family, "sliding window of 24 tokens from layer 1 on") in card


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[str, Path]:
    """A run from scratch of every family: three steps on two ranks, tensor parallel."""
    folder = tmp_path_factory.mktemp("runs")
    found = {family: folder / family / "run" for family in OPTIONS}
    run_on_ranks(2, pretrain_all, corpus, {family: str(run) for family, run in found.items()})
    return found


def pretrain_all(corpus: str, folders: dict[str, str]) -> None:
    from pause_megatron.train.pretrain import pretrain

    for family, folder in folders.items():
        sizes = {"layers": 3, "hidden": 64, "heads": 8, "kv_heads": 2, "tied": False, "vocab_multiple": 32}
        config = tiny_config(
            *(f"data.prefix={corpus}", f"run.dir={folder}", "parallel.tensor=2", "engine.zero_stage=1"),
            *("data.sequence_length=64", "data.split=90,10,0", "batch.global_size=4", "batch.micro_size=2"),
            *("engine.precision=fp32", "optim.lr=0.01", "optim.schedule=constant", "train.steps=3", "pause.rate=0.2"),
            *("checkpoint.every=0", "validation.every=3", "validation.samples=4", "log.tensorboard=false"),
            **{**sizes, **OPTIONS[family][1], **(NO_WINDOW if family == "qwen2" else {})},
        )
        assert pretrain(config) == 0


@pytest.mark.parametrize("family", OPTIONS)
def test_pretrain_export_and_generate(runs, tmp_path, family):
    """From keys of `model:` alone: it learns, exports as its family, and generates with pauses."""
    from transformers import AutoTokenizer

    from pause_megatron.inference.generate import PauseGenerator

    run = runs[family]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    manifest = Manifest.load((run / "checkpoints" / "latest").resolve())
    model = load(run / "config.yaml").model
    table = {f"decoder.layers.0.{tensor.name}" for tensor in layer_tensors(model)}
    assert {name for name in manifest.parameters if name.startswith("decoder.layers.0.")} == table
    done = export(run, tmp_path / "out")
    exported = loaded(done.folder)
    # transformers reads any tokenizer of a qwen2 folder as Qwen2's own: with other ids, the model becomes a Llama.
    expected = "LlamaForCausalLM" if family == "qwen2" else FAMILIES[family].architecture
    assert type(exported).__name__ in {expected, FAMILIES[family].architecture}
    assert done.parity.source == "corpus" and done.parity.largest_difference <= done.parity.tolerance
    generator = PauseGenerator(exported, AutoTokenizer.from_pretrained(done.folder, trust_remote_code=False))
    prompts = ["My fellow citizens, we", "The state of the union"]
    with_pauses, without = (
        generator.generate(prompts, pauses=count, max_new_tokens=30, keep_logits=True).completions for count in (4, 0)
    )
    for one, two in zip(with_pauses, without, strict=True):
        assert not set(one.ids) & set(generator.pause.ids)
        assert float((one.logits[0] - two.logits[0]).abs().max()) > 1e-3  # the pauses are read


def random_options(family: str, number: int) -> dict[str, Any]:
    """Sizes and options of a small model of a family, of every kind that it has."""
    draw = random.Random(f"{family} {number}")
    kv_heads, queries, channels = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([4, 8, 16])
    heads = kv_heads * queries
    options: dict[str, Any] = {
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * channels},
        **{"intermediate_size": draw.choice([24, 40]), "num_hidden_layers": draw.choice([1, 2, 4])},
        **{"tie_word_embeddings": draw.random() < 0.5, "rms_norm_eps": draw.choice([1e-5, 1e-6, 1e-3])},
    }
    if draw.random() < 0.5 or family == "qwen3":
        options["head_dim"] = draw.choice([4, 8, 24])
    linear = {"rope_type": "linear", "factor": 2.5}
    bounds = {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.8}
    rope = draw.choice([None, LLAMA3, YARN, linear, bounds])
    options |= {"rope_parameters": {**(rope or {"rope_type": "default"}), "rope_theta": draw.choice([1e4, 5e5])}}
    if FAMILIES[family].attention_bias == "flag":
        options["attention_bias"] = draw.random() < 0.5
    if FAMILIES[family].mlp_bias:
        options["mlp_bias"] = draw.random() < 0.5
    if FAMILIES[family].sliding == "all":
        options["sliding_window"] = draw.choice([None, 1, 17, 1000])
    if FAMILIES[family].sliding == "from":
        slides = {"use_sliding_window": True, "sliding_window": draw.choice([1, 17, 1000])}
        options |= draw.choice([{}, {**slides, "max_window_layers": draw.randrange(5)}])
    return options


@pytest.mark.parametrize("family", OPTIONS)
def test_random_configurations(tokenizer, tmp_path, full, family):
    """In and out again, with the comparisons of both; and config.json as transformers reads it stays the same."""
    from transformers import AutoConfig

    for number in range(8 if full else 2):
        options = random_options(family, number)
        source = write_model(tmp_path / f"{number}", family, tokenizer, torch.float32, **options)
        done = import_folder(source, tmp_path / f"{number}-native")
        export(done.folder, tmp_path / f"{number}-out")
        before, after = tensors(source), tensors(tmp_path / f"{number}-out")
        assert before.keys() == after.keys(), options
        assert all(torch.equal(after[name][: len(value)], value) for name, value in before.items()), options
        read, back = (AutoConfig.from_pretrained(path).to_dict() for path in (source, tmp_path / f"{number}-out"))
        ignored = {"vocab_size", "pause", "dtype", "transformers_version", "_name_or_path", "max_window_layers"}
        ignored |= {"sliding_window", "use_sliding_window", "rope_parameters", "head_dim"}
        assert {k: v for k, v in read.items() if k not in ignored} == {
            k: v for k, v in back.items() if k not in ignored
        }, options
