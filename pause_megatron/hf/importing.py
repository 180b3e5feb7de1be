"""Import of a Hugging Face folder of a family to a checkpoint of any tensor-parallel size, with pause rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pause_megatron.config.families import FAMILIES
from pause_megatron.config.load import dump
from pause_megatron.data.tokenizer.backends import HuggingFaceBackend, open_backend
from pause_megatron.data.tokenizer.companions import CONFIG, GENERATION, TEMPLATE, TEMPLATES, companions_of
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN, Tokenizer, load_tokenizer
from pause_megatron.errors import CheckpointError, DataError
from pause_megatron.files.durable import sync_folder, write_whole
from pause_megatron.hf.architecture import Architecture, check_readable, read_architecture
from pause_megatron.hf.atomic_dir import atomic_dir, output_folder
from pause_megatron.hf.chat_template import templates_in
from pause_megatron.hf.checkpoint import open_checkpoint
from pause_megatron.hf.folder import SourceFolder, SourceWeights
from pause_megatron.hf.imported import imported_config
from pause_megatron.hf.native_writer import PauseRows, write_native
from pause_megatron.hf.parity import check_import
from pause_megatron.hf.tokenizer import with_pauses
from pause_megatron.hf.weights import HFTensor, hf_tensors, native_rows
from pause_megatron.model import Vocabulary
from pause_megatron.terminal.progress import Report

_UNUSED = ("rotary_emb.inv_freq",)
_TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        folder: The checkpoint.
        family: Model type, a key of `FAMILIES`.
        rows: Vocabulary rows of the source.
        pause_ids: The K pause ids.
        how: Origin of the pause rows: "kept" (of the source), "free slot" or "grown vocabulary".
        largest_difference: Largest difference of a logit from that of transformers; None if they were not compared.
    """

    folder: Path
    family: str
    rows: int
    pause_ids: tuple[int, ...]
    how: str
    largest_difference: float | None


def import_folder(
    source: str | Path,
    output: str | Path,
    *,
    pause_token: str = PAUSE_TOKEN,
    tensor_parallel: int = 1,
    sequence_length: int | None = None,
    seed: int = 1234,
    compare: bool = True,
    report: Report = lambda stage, done, total: None,
) -> Imported:
    """Import a folder as a checkpoint for `pretrain model.from=...`.

    Weights are streamed, optimizer moments are zero, the step is 0. Before the checkpoint is renamed into place, its
    logits are compared with those that transformers computes from the source.

    Args:
        source: Folder with config.json, safetensors and a tokenizer.
        output: The checkpoint; new or empty.
        pause_token: A special token of the tokenizer that serves as pause; `<pause>` is added if missing.
        tensor_parallel: Tensor-parallel size of the checkpoint; `model.from` reads any.
        sequence_length: Longest window; None for the source's max_position_embeddings.
        seed: Seed of the pause rows.
        compare: Whether logits are compared at the end, for which the whole model is in memory in fp32.
        report: Progress callback: (stage, bytes done, bytes in all).

    Returns:
        The checkpoint, its pause ids and the result of the comparison.

    Raises:
        CheckpointError: Another architecture or an option that the native model lacks, weights that are pickles or do
            not fit config.json, an unusable tokenizer, an output that is not empty, or logits that differ.
        ConfigError: The sizes cannot be sharded for `tensor_parallel`.
    """
    output = output_folder(output)
    folder = SourceFolder(source)
    if folder.has("adapter_config.json"):
        raise CheckpointError(
            f"{folder.path}: expected a whole model, this one holds a PEFT adapter; merge it first (merge_and_unload)"
        )
    config_json = folder.json("config.json")
    architecture = read_architecture(config_json, str(folder.path / "config.json"), sequence_length)
    weights, tensors = _weights(folder, architecture)
    check_readable(config_json, FAMILIES[architecture.family], str(folder.path / "config.json"))
    tokenizer = import_tokenizer(folder, architecture, pause_token)
    pause_ids = tuple(tokenizer.pause_ids)
    config = imported_config(
        architecture.model,
        where=str(folder.path / "config.json"),
        sequence_length=architecture.sequence_length,
        embeddings=len(pause_ids),
        tensor_parallel=tensor_parallel,
        precision="fp32" if architecture.dtype == "fp32" else "bf16",
        positions=_positions(architecture, str(folder.path / "config.json")) if tokenizer.kept else "own",
    )
    new_rows = () if tokenizer.kept else pause_ids
    with atomic_dir(output) as staging:
        write_whole(staging / "config.yaml", dump(config).encode())
        tokenizer.native.save(staging / "tokenizer")
        write_native(
            staging,
            config,
            native_rows(tensors),
            weights,
            vocabulary=Vocabulary(tokenizer.native.vocab_size, pause_ids),
            pauses=PauseRows(new_rows, tokenizer.text_size, seed),
            corpus=f"imported:{tokenizer.native.fingerprint}",
            report=report,
        )
        sync_folder(staging)
        difference = None
        if compare:
            report("comparing with transformers", 0, 1)
            difference = check_import(open_checkpoint(staging, report), folder.path, architecture.rows, new_rows)
            report("comparing with transformers", 1, 1)
    how = "kept" if tokenizer.kept else "free slot" if pause_ids[0] < architecture.rows else "grown vocabulary"
    return Imported(output, architecture.family, architecture.rows, pause_ids, how, difference)


def _positions(architecture: Architecture, where: str) -> Literal["own", "shared"]:
    """Return the positions of the pauses of an export of this package."""
    positions = (architecture.pause or {}).get("positions", "own")
    if positions not in ("own", "shared"):
        raise CheckpointError(f"{where}: pause.positions: expected own or shared, got {str(positions)[:60]!r}")
    return positions


@dataclass(frozen=True)
class ImportedTokenizer:
    """The native tokenizer of an import.

    Attributes:
        native: The tokenizer, with its pauses.
        pause_ids: The K pause ids.
        kept: Whether the source has rows for them.
        text_size: Number of the source's own ids.
    """

    native: Tokenizer
    pause_ids: range
    kept: bool
    text_size: int


def import_tokenizer(folder: SourceFolder, architecture: Architecture, token: str) -> ImportedTokenizer:
    """Return the native tokenizer of a folder, with its pauses.

    Args:
        folder: Folder with tokenizer.json or tokenizer.model.
        architecture: Rows and pause entry of the source.
        token: The special token that serves as pause; `<pause>` is added if missing.

    Raises:
        CheckpointError: The tokenizer cannot be used, or does not fit the rows.
    """
    for name in _TOKENIZER_JSON:
        if folder.has(name) and folder.json(name).get("auto_map"):
            raise CheckpointError(
                f"{folder.path / name}: auto_map requires code from the folder, which is never executed; remove the key"
            )
    names = [name for name in ("tokenizer.json", "tokenizer.model") if folder.has(name)]
    if not names:
        raise CheckpointError(
            f"{folder.path}: expected tokenizer.json or tokenizer.model, got neither; save the tokenizer there with "
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
    return ImportedTokenizer(native, ids, existing is not None and ids.stop <= architecture.rows, text_size)


def _companions(folder: SourceFolder, rows: int) -> dict[str, bytes]:
    """Chat templates, special tokens and end-of-answer ids, as bytes; checked to be files of the folder."""
    for name in (*_TOKENIZER_JSON, TEMPLATE, GENERATION):
        if folder.has(name):
            folder.file(name)
    folder.files_in(TEMPLATES)
    companions = companions_of(folder.path, generation=True)
    templates_in(folder.path)  # raises if an export could not write the variant with pauses beside them
    ends = folder.json(GENERATION) if folder.has(GENERATION) else {}
    if "eos_token_id" not in ends:  # transformers then uses that of the model
        config = folder.json("config.json") if folder.has("config.json") else {}
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
        companions[GENERATION] = json.dumps(ends, indent=2).encode()
    return companions


def _refuse_added_tokens(folder: SourceFolder, pieces: int) -> None:
    """Refuse tokens that were added after the pieces of a SentencePiece model, which does not contain them."""
    added = {}
    if folder.has(CONFIG):
        entries = folder.json(CONFIG).get("added_tokens_decoder")
        added = {str(index): entry for index, entry in entries.items()} if isinstance(entries, dict) else {}
    if folder.has("added_tokens.json"):
        added |= {str(index): name for name, index in folder.json("added_tokens.json").items()}
    beyond = [index for index in added if index.isdecimal() and int(index) >= pieces]
    if beyond:
        raise CheckpointError(
            f"{folder.path}: expected tokenizer.json, as tokens were added after the {pieces:,} pieces of "
            f"tokenizer.model (id {beyond[0]} and {len(beyond) - 1} more); save it there with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained)"
        )


def _pause_ids(
    existing: int | None, vocab_size: int, architecture: Architecture, folder: SourceFolder, token: str
) -> range:
    """Ids of the token if it exists; otherwise the last row if the tokenizer does not use it, or a new row after it."""
    rows = architecture.rows
    if vocab_size > rows + (existing == rows):
        raise CheckpointError(
            f"{folder.path}: expected ids below vocab_size={rows} in the tokenizer, got up to {vocab_size - 1}"
        )
    if existing is None:
        if token != PAUSE_TOKEN:
            raise CheckpointError(
                f"--pause-token {token}: expected a special token of the tokenizer, {folder.path} has no such token; "
                f"name another, or omit the option to add {PAUSE_TOKEN}"
            )
        first = rows - 1 if vocab_size < rows else rows
        return range(first, first + 1)
    ids = (architecture.pause or {}).get("ids", [existing])
    if ids != list(range(existing, existing + len(ids))):
        raise CheckpointError(
            f"{folder.path / 'config.json'}: pause.ids: expected consecutive ids from {existing} (the tokenizer's "
            f"{token}), got {str(ids)[:80]}"
        )
    return range(existing, existing + len(ids))


def _weights(folder: SourceFolder, architecture: Architecture) -> tuple[SourceWeights, list[HFTensor]]:
    """Open the folder's tensors and compare them with the expected ones, before memory is allocated for them."""
    model, weights = architecture.model, SourceWeights(folder)
    if model.layers > len(weights):
        raise CheckpointError(
            f"{folder.path / 'config.json'}: num_hidden_layers: expected at most the {len(weights)} tensors that the "
            f"files hold, got {model.layers}"
        )
    weights.expect("model.layers.0.self_attn.k_proj.weight", (model.kv_width, model.hidden))  # before a table by heads
    tensors = hf_tensors(model, architecture.rows, FAMILIES[architecture.family])
    unused = (*_UNUSED, "lm_head.weight") if model.tied else _UNUSED
    weights.check({tensor.name: tensor.shape for tensor in tensors}, unused)
    if model.tied and "lm_head.weight" in weights:
        _check_tied(weights, architecture.rows, folder)
    return weights, tensors


def _check_tied(weights: SourceWeights, rows: int, folder: SourceFolder) -> None:
    """Check that the output layer of a tied model, if its files have one, equals the embedding."""
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        if not torch.equal(
            weights.rows("lm_head.weight", start, stop), weights.rows("model.embed_tokens.weight", start, stop)
        ):
            raise CheckpointError(
                f"{folder.path}: lm_head.weight: expected the embedding (config.json: tie_word_embeddings), got other "
                f"values in rows {start} to {stop}; set the key to false if the model has an untied output layer"
            )
