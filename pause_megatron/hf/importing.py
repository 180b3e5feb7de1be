"""A Hugging Face folder of the Llama family as a checkpoint of any tensor-parallel size, with rows for pauses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pause_megatron.checkpoint.verify import Report
from pause_megatron.config.load import dump, resolve
from pause_megatron.config.rules import check
from pause_megatron.config.schema import (
    DataSection,
    EngineSection,
    ParallelSection,
    PauseSection,
    ResolvedConfig,
)
from pause_megatron.data.tokenizer.backends import HuggingFaceBackend, open_backend
from pause_megatron.data.tokenizer.companions import CONFIG, GENERATION, TEMPLATE, TEMPLATES, companions_of
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN, Tokenizer, load_tokenizer
from pause_megatron.errors import CheckpointError, DataError
from pause_megatron.files.durable import sync_folder, write_whole
from pause_megatron.hf.atomic_dir import appearing, new_folder
from pause_megatron.hf.architecture import Architecture, read_architecture
from pause_megatron.hf.checkpoint import open_checkpoint
from pause_megatron.hf.folder import SourceFolder, SourceWeights
from pause_megatron.hf.native_writer import PauseRows, write_native
from pause_megatron.hf.parity import prove_import
from pause_megatron.hf.tokenizer import with_pauses
from pause_megatron.hf.weights import HFTensor, hf_tensors
from pause_megatron.model import Vocabulary

_UNUSED = ("rotary_emb.inv_freq",)
_TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Imported:
    """What an import made.

    Attributes:
        folder: the checkpoint
        family: "llama", "mistral" or "qwen2"
        rows: vocabulary rows of the source
        pause_ids: where the pauses are
        how: "kept" (the source had them), "free slot" or "grown vocabulary"
        largest_difference: of any logit from transformers' own
    """

    folder: Path
    family: str
    rows: int
    pause_ids: tuple[int, ...]
    how: str
    largest_difference: float


def import_folder(
    source: str | Path,
    output: str | Path,
    *,
    pause_token: str = PAUSE_TOKEN,
    tensor_parallel: int = 1,
    sequence_length: int | None = None,
    seed: int = 1234,
    report: Report = lambda stage, done, total: None,
) -> Imported:
    """Writes a checkpoint that `pretrain model.from=...` begins with.

    Weights are streamed, optimizer moments are zero, the step is 0. Before the checkpoint appears its logits are
    compared with those that transformers computes from the source.

    Args:
        source: folder with config.json, safetensors and a tokenizer
        output: must not exist, or be empty
        pause_token: a special token of the tokenizer that serves as pause; `<pause>` is added where there is none
        tensor_parallel: ranks that the checkpoint is cut for; `model.from` reads any
        sequence_length: longest window; default: the source's max_position_embeddings
        seed: of the pause rows
        report: told what is being done, bytes done and bytes in all

    Raises:
        CheckpointError: another architecture or an option that the native model lacks, weights that are pickles or do
            not fit config.json, a tokenizer that cannot be used, an output that is not empty, or logits that differ.
        ConfigError: the sizes cannot be cut for `tensor_parallel`.
    """
    output = new_folder(output)
    folder = SourceFolder(source)
    config_json = folder.json("config.json")
    architecture = read_architecture(config_json, str(folder.path / "config.json"), sequence_length)
    if folder.has("adapter_config.json"):
        raise CheckpointError(f"{folder.path}: holds a PEFT adapter; merge it into the model first (merge_and_unload)")
    weights, tensors = _weights(folder, architecture)
    tokenizer = _tokenizer(folder, architecture, pause_token)
    pause_ids = tuple(tokenizer.pause_ids)
    config = _config(architecture, len(pause_ids), tensor_parallel)
    new_rows = () if tokenizer.kept else pause_ids
    with appearing(output) as hidden:
        write_whole(hidden / "config.yaml", dump(config).encode())
        tokenizer.native.save(hidden / "tokenizer")
        write_native(
            hidden,
            config,
            tensors,
            weights,
            vocabulary=Vocabulary(tokenizer.native.vocab_size, pause_ids),
            pauses=PauseRows(new_rows, tokenizer.text_size, seed),
            corpus=f"imported:{tokenizer.native.fingerprint}",
            report=report,
        )
        sync_folder(hidden)
        report("comparing with transformers", 0, 1)
        difference = prove_import(open_checkpoint(hidden, report), folder.path, architecture.rows, new_rows)
        report("comparing with transformers", 1, 1)
    how = "kept" if tokenizer.kept else "free slot" if pause_ids[0] < architecture.rows else "grown vocabulary"
    return Imported(output, architecture.family, architecture.rows, pause_ids, how, difference)


def _config(architecture: Architecture, embeddings: int, tensor_parallel: int) -> ResolvedConfig:
    precision = "fp32" if architecture.dtype == "fp32" else "bf16"
    config = resolve(
        ResolvedConfig(
            data=DataSection(sequence_length=architecture.sequence_length),
            model=architecture.model,
            pause=PauseSection(rate=0.0, embeddings=embeddings),
            parallel=ParallelSection(tensor=tensor_parallel),
            engine=EngineSection(precision=precision),
        )
    )
    check(config)
    return config


@dataclass(frozen=True)
class _Tokenizer:
    """The native tokenizer, where its pauses are, whether the source has rows for them, and the source's own ids."""

    native: Tokenizer
    pause_ids: range
    kept: bool
    text_size: int


def _tokenizer(folder: SourceFolder, architecture: Architecture, token: str) -> _Tokenizer:
    for name in _TOKENIZER_JSON:
        if folder.has(name) and folder.json(name).get("auto_map"):
            raise CheckpointError(
                f"{folder.path / name}: auto_map asks for code that comes with the folder, which is never run here"
            )
    names = [name for name in ("tokenizer.json", "tokenizer.model") if folder.has(name)]
    if not names:
        raise CheckpointError(
            f"{folder.path}: expected tokenizer.json or tokenizer.model, found neither; save the tokenizer there with "
            "transformers (AutoTokenizer.from_pretrained(...).save_pretrained)"
        )
    path = folder.file(names[0])
    companions = _companions(folder, architecture.rows)
    try:
        backend = open_backend(str(path))
        if not isinstance(backend, HuggingFaceBackend):
            _refuse_added_tokens(folder, backend.vocab_size)
        existing = backend.id_of(token)
        ids = _pause_ids(existing, backend.vocab_size, architecture, folder, token)
        eod = load_tokenizer(path, pause_id=ids.start).eod
        if isinstance(backend, HuggingFaceBackend):
            extended = with_pauses(json.loads(backend.content), {}, ids, eod=eod, where=str(path)).document
            backend = HuggingFaceBackend(json.dumps(extended).encode(), str(path), backend.special_tokens)
        native = Tokenizer(backend, eod=eod, pause_id=ids.start, companions=companions)
        native.check_pause_ids(len(ids))
    except DataError as error:
        raise CheckpointError(f"{folder.path}: its tokenizer cannot be used: {error}") from None
    text_size = min(open_backend(str(path)).vocab_size, architecture.rows)
    return _Tokenizer(native, ids, existing is not None and ids.stop <= architecture.rows, text_size)


def _companions(folder: SourceFolder, rows: int) -> dict[str, bytes]:
    """Chat templates, roles of tokens, and where answers end; as bytes, after a look at where they lie."""
    for name in (*_TOKENIZER_JSON, TEMPLATE, GENERATION):
        if folder.has(name):
            folder.file(name)
    folder.files_in(TEMPLATES)
    found = companions_of(folder.path, generation=True)
    ends = folder.json(GENERATION) if folder.has(GENERATION) else {}
    if "eos_token_id" not in ends:  # transformers then takes the model's own
        config = folder.json("config.json")
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        ends = {key: config[key] for key in keys if config.get(key) is not None} | ends
    stops = ends.get("eos_token_id")
    for index in stops if isinstance(stops, list) else [] if stops is None else [stops]:
        if type(index) is not int or not 0 <= index < rows:
            raise CheckpointError(
                f"{folder.path}: eos_token_id (generation_config.json, else config.json): expected ids below the "
                f"{rows} rows of the embedding, got {str(index)[:60]!r}"
            )
    if ends:
        found[GENERATION] = json.dumps(ends, indent=2).encode()
    return found


def _refuse_added_tokens(folder: SourceFolder, pieces: int) -> None:
    """A SentencePiece model knows nothing of tokens that were added behind its pieces: their ids would be lost."""
    added = {}
    if folder.has(CONFIG):
        entries = folder.json(CONFIG).get("added_tokens_decoder")
        added = {str(index): entry for index, entry in entries.items()} if isinstance(entries, dict) else {}
    if folder.has("added_tokens.json"):
        added |= {str(index): name for name, index in folder.json("added_tokens.json").items()}
    beyond = [index for index in added if index.isdecimal() and int(index) >= pieces]
    if beyond:
        raise CheckpointError(
            f"{folder.path}: expected tokenizer.json, as tokens were added behind the {pieces:,} pieces of "
            f"tokenizer.model (id {beyond[0]} and {len(beyond) - 1} more); save it there with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained)"
        )


def _pause_ids(
    existing: int | None, vocab_size: int, architecture: Architecture, folder: SourceFolder, token: str
) -> range:
    """The token's own id; else the last row if the tokenizer leaves rows unused; else the row after the last."""
    rows = architecture.rows
    if vocab_size > rows + (existing == rows):
        raise CheckpointError(
            f"{folder.path}: the tokenizer has ids up to {vocab_size - 1}, the embedding only {rows} rows (vocab_size)"
        )
    if existing is None:
        if token != PAUSE_TOKEN:
            raise CheckpointError(
                f"--pause-token {token}: the tokenizer of {folder.path} has no such token; name one of its special "
                f"tokens, or leave it out to add {PAUSE_TOKEN}"
            )
        first = rows - 1 if vocab_size < rows else rows
        return range(first, first + 1)
    ids = (architecture.pause or {}).get("ids", [existing])
    if ids != list(range(existing, existing + len(ids))):
        raise CheckpointError(
            f"{folder.path / 'config.json'}: pause.ids: expected consecutive ids from {existing} (the tokenizer's "
            f"{token}), came {str(ids)[:80]}"
        )
    return range(existing, existing + len(ids))


def _weights(folder: SourceFolder, architecture: Architecture) -> tuple[SourceWeights, list[HFTensor]]:
    """The folder's tensors and what they should be, compared before anything of their size is made."""
    model, weights = architecture.model, SourceWeights(folder)
    if model.layers > len(weights):
        raise CheckpointError(
            f"{folder.path / 'config.json'}: num_hidden_layers: expected at most the {len(weights)} tensors that the "
            f"files hold, came {model.layers}"
        )
    tensors = hf_tensors(model, architecture.rows, architecture.family)
    unused = (*_UNUSED, "lm_head.weight") if model.tied else _UNUSED
    weights.check({tensor.name: tensor.shape for tensor in tensors}, unused)
    if model.tied and "lm_head.weight" in weights:
        _check_tied(weights, architecture.rows, folder)
    for tensor in tensors:
        if not tensor.rows and weights.rows(tensor.name, 0, tensor.shape[0]).any():
            raise CheckpointError(f"{folder.path}: {tensor.name} is not zero; the native model has no such bias")
    return weights, tensors


def _check_tied(weights: SourceWeights, rows: int, folder: SourceFolder) -> None:
    """A tied model may keep its output layer besides; then it must be the embedding."""
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        if not torch.equal(
            weights.rows("lm_head.weight", start, stop), weights.rows("model.embed_tokens.weight", start, stop)
        ):
            raise CheckpointError(
                f"{folder.path}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding "
                f"in rows {start} to {stop}; set it to false if the model has an output layer of its own"
            )
