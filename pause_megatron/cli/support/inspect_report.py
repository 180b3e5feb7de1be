"""The report of `inspect`, as text for a terminal or as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pause_megatron.config.batching import pause_counts
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.side import distribution, find_side, summarize_side
from pause_megatron.data.tokenizer.tokenizer import PAUSE_TOKEN
from pause_megatron.data.windows.inspection import RUN_LENGTHS, Fertility, Lengths, PolicyStatistics, WindowView
from pause_megatron.errors import DataError

BAR = 40
"""Characters of the longest bar of the histogram."""

WIDTH = 110
"""Characters of a line of text."""


@dataclass(frozen=True)
class CorpusReport:
    """Statistics of a corpus and of its windows.

    Attributes:
        corpus: The corpus.
        lengths: Lengths of its documents.
        fertility: Tokens per byte, character and word.
        config: The configuration of the windows.
        policies: Statistics of the placement policies.
        windows: Windows to show.
    """

    corpus: Corpus
    lengths: Lengths
    fertility: Fertility
    config: ResolvedConfig
    policies: Sequence[PolicyStatistics]
    windows: Sequence[WindowView]

    def as_json(self) -> str:
        """Return one JSON object; floats are not rounded."""
        return _as_json(self)

    def as_text(self, *, colour: bool) -> str:
        """Return paragraphs for a terminal.

        Args:
            colour: Whether to highlight pauses in reverse video.
        """
        sides = [_sides(self.corpus)] if self.corpus.manifest.sides else []
        parts = [
            _counts(self.corpus, self.fertility),
            *sides,
            _histogram(self.lengths),
            _policies(self.config, self.policies),
            *(_window(window, colour) for window in self.windows),
        ]
        return "\n\n".join(parts)


def _as_json(report: CorpusReport) -> str:
    manifest = report.corpus.manifest
    content = {
        "prefix": report.corpus.prefix,
        "counts": manifest.counts.model_dump(),
        "bytes": {name: record.bytes for name, record in manifest.files.items()},
        "dtype": manifest.dtype,
        "tokenizer": manifest.tokenizer.model_dump(),
        "sources": len(manifest.sources) if manifest.adoption is None else None,
        "adoption": manifest.adoption and manifest.adoption.model_dump(),
        "fingerprint": manifest.fingerprint,
        "sides": {name: _side_as_json(report.corpus, name) for name in manifest.sides},
        "lengths": dataclasses.asdict(report.lengths),
        "fertility": dataclasses.asdict(report.fertility),
        "sequence_length": report.config.data.sequence_length,
        "pause": report.config.pause.model_dump(),
        "policies": [dataclasses.asdict(policy) for policy in report.policies],
        "windows": [dataclasses.asdict(window) for window in report.windows],
    }
    return json.dumps(content, indent=1)


def _sides(corpus: Corpus) -> str:
    lines = []
    for name in corpus.manifest.sides:
        try:
            text = summarize_side(find_side(corpus.prefix, name, corpus.manifest))
        except DataError as error:  # the corpus can be used without it
            text = f"not usable: {error}"
        lines.append(f"  {name:16} {text}")
    return "side arrays\n" + "\n".join(lines)


def _side_as_json(corpus: Corpus, name: str) -> dict[str, Any]:
    record = corpus.manifest.sides[name].model_dump(mode="json")
    try:
        values = find_side(corpus.prefix, name, corpus.manifest).values()
    except DataError as error:
        return record | {"error": str(error)}
    return record | dataclasses.asdict(distribution(values))


def _counts(corpus: Corpus, fertility: Fertility) -> str:
    manifest, counts = corpus.manifest, corpus.manifest.counts
    sampled = "all" if counts.text_bytes is None else "the last two"
    rows = [
        *_origin(corpus),
        ("tokens", f"{counts.tokens:,}, of which {manifest.eod_count:,} EOD"),
        ("text", "not known" if counts.text_bytes is None else f"{counts.text_bytes:,} bytes of UTF-8"),
        ("on disk", f"{sum(record.bytes for record in manifest.files.values()):,} bytes ({manifest.dtype} ids)"),
        (
            "tokenizer",
            f"{manifest.tokenizer.kind}, {manifest.tokenizer.vocab_size:,} ids, EOD {manifest.tokenizer.eod}, "
            f"<pause> {manifest.tokenizer.pause_id}",
        ),
        (
            "fertility",
            f"{fertility.per_byte:.3f} tokens/byte, {fertility.per_character:.3f} tokens/character, "
            f"{fertility.per_word:.3f} tokens/word ({sampled} over {fertility.documents:,} documents)",
        ),
    ]
    return f"corpus {corpus.prefix}\n" + "\n".join(f"  {name:16} {value}" for name, value in rows)


def _origin(corpus: Corpus) -> list[tuple[str, str]]:
    manifest, counts = corpus.manifest, corpus.manifest.counts
    if manifest.adoption is None:
        malformed = f"{counts.malformed_total:,} left out{_kinds(counts.malformed)}"
        return [
            ("documents", f"{counts.documents:,} from {len(manifest.sources):,} sources"),
            ("malformed lines", malformed),
        ]
    without = manifest.adoption.without_eod
    return [
        (
            "documents",
            f"{counts.documents:,}, adopted: made by another program, from unknown sources"
            + (f"; {without:,} do not end with EOD" if without else ""),
        )
    ]


def _kinds(malformed: dict[str, int]) -> str:
    return f" ({', '.join(f'{kind} {count:,}' for kind, count in malformed.items())})" if malformed else ""


def _histogram(lengths: Lengths) -> str:
    quantiles = ", ".join(f"{percent} %: {value:,}" for percent, value in lengths.quantiles.items())
    lines = [
        "tokens of a document",
        f"  shortest {lengths.shortest:,}, mean {lengths.mean:,.1f}, longest {lengths.longest:,}; {quantiles}",
    ]
    most, total = max(lengths.counts), sum(lengths.counts)
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "#" * (-(-count * BAR // most))
        lines.append(f"  {f'{low:,} to {high - 1:,}':>22}  {bar:{BAR}} {count:>13,} {count / total:7.2%}")
    return "\n".join(lines)


def _policies(config: ResolvedConfig, policies: Sequence[PolicyStatistics]) -> str:
    pause, length = config.pause, config.data.sequence_length
    inserted = pause_counts(config).inserted
    sizes = [str(size) for size in range(1, RUN_LENGTHS)] + [f"{RUN_LENGTHS}+"]
    lines = [
        f"pauses in windows of {length:,} tokens: {_said(config)} inserts {inserted:,}; "
        "shares of runs by number of pauses (* = as configured)",
        f"  {'pause.placement':22} {'window':7} {'rate':>7} {'pauses':>13}"
        + "".join(f"{'run of ' + size:>10}" for size in sizes)
        + f"{'longest':>9}",
    ]
    for policy in policies:
        mark = "*" if (policy.placement, policy.window) == (pause.placement, pause.window) else " "
        pauses = f"{policy.fewest:,}" if policy.fewest == policy.most else f"{policy.fewest:,}..{policy.most:,}"
        lines.append(
            f"{mark} {policy.placement:22} {policy.window:7} {policy.rate:>7.2%} {pauses:>13}"
            + "".join(f"{share:>10.2%}" for share in policy.runs)
            + f"{policy.longest_run:>9,}"
        )
    return "\n".join(lines)


def _said(config: ResolvedConfig) -> str:
    pause = config.pause
    runs = f"pause.run={pause.run}"
    if pause.placement == "every":
        return runs if pause.rate else "pause.rate=0"
    return f"pause.rate={pause.rate:g}{'' if pause.run == 1 else f' with {runs}'}"


def _window(window: WindowView, colour: bool) -> str:
    head = (
        f"window {window.sample:,}: {window.tokens:,} tokens, {window.pauses:,} of them pauses "
        f"({window.pauses / window.tokens:.2%}); {window.targets:,} targets, {window.targets_after_pause:,} of them "
        "predicted from a pause"
    )
    lines = [
        line
        for paragraph in window.text.splitlines()
        for line in textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False) or [""]
    ]
    text = "\n".join(f"  {line}" for line in lines)
    return f"{head}\n" + (text.replace(PAUSE_TOKEN, f"\033[7m{PAUSE_TOKEN}\033[0m") if colour else text)
