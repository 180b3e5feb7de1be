"""Scoring of a corpus: units in PREFIX.NAME.parts/, computed in parallel, joined to a side array at the end.

A kill leaves the finished units, from which the same command continues. The values do not depend on the number of
processes or of interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pause_megatron.data.corpus.corpus import Corpus, open_corpus
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.corpus.records import FileRecord, SideRecord
from pause_megatron.data.corpus.side import SideArray, check_side_name, find_side
from pause_megatron.data.corpus.side_writing import only_side_writer, require_free, write_side
from pause_megatron.evaluate.fingerprint import model_fingerprint
from pause_megatron.score.compute import compute_units, storage_errors
from pause_megatron.score.model import ModelFacts, check_tokenizer, find_devices, read_facts, sizes
from pause_megatron.score.plan import Parts, SidePlan, UnitConfig
from pause_megatron.score.units import unit_tokens
from pause_megatron.score.windows import CorpusReader, CorpusUnit, document_offsets, units_of
from pause_megatron.terminal.progress import Report, no_report


@dataclass(frozen=True)
class ScoreOptions:
    """Options of a scoring.

    Attributes:
        kind: "loss" of each token, or "entropy" of its prediction, in nats.
        name: Name of the side array.
        context: Largest number of tokens that the model reads at a time; None for 2048, or fewer of a smaller model.
        batch_tokens: Largest number of tokens of a forward pass; None for 8192, or the context.
        processes: Number of processes; None for one each core that memory allows, or one each GPU.
        device: "cpu", "cuda", or "auto" for GPUs where there are any.
        dtype: Data type of the forward pass, "fp32", "bf16" or "fp16"; None for that of the stored weights.
        store: Data type of the values.
        overwrite: Replace a side array, or unfinished units, of other options.
    """

    kind: Literal["loss", "entropy"] = "loss"
    name: str = "score"
    context: int | None = None
    batch_tokens: int | None = None
    processes: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    store: Literal["float32", "float16"] = "float32"
    overwrite: bool = False


@dataclass(frozen=True)
class Scored:
    """The result of `score`.

    Attributes:
        side: The side array.
        reused: Number of tokens whose values earlier runs had computed.
        seconds: Wall-clock time of this run.
        processes: Number of processes; 0 if it existed with the same model and options.
    """

    side: SideArray
    reused: int
    seconds: float
    processes: int


def score(prefix: str | Path, folder: str | Path, options: ScoreOptions, report: Report = no_report) -> Scored:
    """Write a side array with the loss or the entropy of a model at each token of a corpus.

    The value of a token is that of its prediction from the tokens before it in its document. The first token of a
    document is predicted from the id that the model's tokenizer puts before a text (BOS), or from EOD if it puts none.

    Args:
        prefix: PREFIX of the corpus.
        folder: What `export-hf` wrote, or another transformers folder with safetensors.
        options: See there.
        report: Progress callback.

    Returns:
        The side array, and how it was made.

    Raises:
        ConfigError: An option that does not fit the model or this machine.
        DataError: The corpus, the model or the side array cannot be used, a process was killed, or the disk is full.
    """
    begun = time.perf_counter()
    check_side_name(options.name)
    corpus, facts = open_corpus(prefix), read_facts(Path(folder))
    check_tokenizer(corpus, Path(folder), facts)
    context, batch_tokens = sizes(options.context, options.batch_tokens, facts)
    devices = find_devices(options.device)
    digest = model_fingerprint(Path(folder), report=report)
    side = SideRecord(
        file=FileRecord(bytes=0, digest=""),
        dtype=options.store,
        bin=corpus.manifest.files["bin"].digest,
        idx=corpus.manifest.files["idx"].digest,
        kind=options.kind,
        model=Path(folder).absolute().name,
        model_digest=digest,
        context=context,
        start=corpus.tokenizer.eod if facts.start is None else facts.start,
        compute=options.dtype or facts.dtype,
        batch_tokens=batch_tokens,
    )
    tokens = corpus.manifest.counts.tokens
    plan = SidePlan(side=side, device="cpu" if devices == ("cpu",) else "cuda", unit_tokens=unit_tokens(tokens))
    config = _config(corpus, str(folder), facts, devices, plan, options.name)
    with storage_errors(prefix), only_side_writer(corpus.prefix, options.name):
        parts = Parts(config.folder, plan)
        if done := _already_done(corpus, side, options.name):
            if parts.begun:  # a kill after the record left them
                parts.remove()
            return Scored(done, tokens, time.perf_counter() - begun, 0)
        require_free(corpus.prefix, options.name, overwrite=options.overwrite, resumed=parts.begun)
        stage = f"score {corpus.label}"
        processes, reused = compute_units(
            _units(corpus, plan), config, options.processes, stage, report, overwrite=options.overwrite
        )
        written = write_side(corpus.prefix, options.name, side, parts.read(_units(corpus, plan)))
        parts.remove()
    return Scored(written, reused, time.perf_counter() - begun, processes)


def _config(
    corpus: Corpus, folder: str, facts: ModelFacts, devices: tuple[str, ...], plan: SidePlan, name: str
) -> UnitConfig:
    side = plan.side
    assert side.start is not None and side.context is not None and side.batch_tokens is not None
    reader = CorpusReader(
        *(corpus.prefix, corpus.manifest.dtype, side.start, side.context, side.batch_tokens),
        *(facts.vocabulary, facts.pauses),
    )
    return UnitConfig(path_of(corpus.prefix, f"{name}.parts"), folder, devices, facts.pauses, plan, reader)


def _units(corpus: Corpus, plan: SidePlan) -> Iterator[CorpusUnit]:
    offsets = document_offsets(corpus.prefix, corpus.manifest.counts.documents)
    assert plan.side.context is not None
    return units_of(offsets, plan.side.context, plan.unit_tokens)


def _already_done(corpus: Corpus, side: SideRecord, name: str) -> SideArray | None:
    record = corpus.manifest.sides.get(name)
    if record is None or record.model_copy(update={"file": side.file, "model": side.model}) != side:
        return None
    return find_side(corpus.prefix, name)
