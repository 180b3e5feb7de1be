"""The prepared corpora of a run, opened and checked together."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from pause_megatron.config.blend import is_number, parse_blend
from pause_megatron.config.schema import DataSection
from pause_megatron.data.corpus.corpus import Corpus, open_corpus, require_one_tokenizer
from pause_megatron.data.corpus.first_use import verify_at_use
from pause_megatron.data.corpus.manifest import Manifest, path_of
from pause_megatron.data.corpus.verify import no_report
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.terminal.log import EVERY_RANK
from pause_megatron.terminal.progress import StageProgress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpora:
    """Attributes:
    corpora: in the order of data.prefix
    valid: in the order of data.valid_prefix
    tokenizer: the one that all of them share
    fingerprint: of what is in those of data.prefix and how they are blended; where the files lie does not matter. For
        data.source: of the tokenizer alone
    """

    corpora: tuple[Corpus, ...]
    valid: tuple[Corpus, ...]
    tokenizer: Tokenizer
    fingerprint: str

    def verify(self, data: DataSection, rank: int = 0) -> None:
        """Reads each corpus whole at its first use, as data.verify says. Every rank calls this; one of them reads.

        Rank 0 shows how far that one is, whichever it is.

        Raises:
            DataError: a byte is not what `prepare` wrote; on every rank.
        """
        with StageProgress(sys.stderr) as progress:
            report = progress.report if rank == 0 else no_report
            for corpus in self.corpora + self.valid:
                verify_at_use(corpus, data.verify, data.cache, report=report, warn=_warn)

    def require_unchanged(self) -> None:
        """Make sure that the files which this process has mapped meanwhile are those that were opened here.

        From now on a corpus may be replaced by others of its name: a mapped file stays what it is.

        Raises:
            DataError: a corpus was prepared anew meanwhile.
        """
        for corpus in self.corpora + self.valid:
            if Manifest.load(corpus.prefix).fingerprint != corpus.manifest.fingerprint:
                raise DataError(f"{corpus.prefix}: prepared anew while this run was opening it. Start the run again")

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids with pauses as `<pause>` and ends of documents as `<eod>`."""
        return self.tokenizer.decode(ids, eod_text="<eod>\n")


def open_corpora(data: DataSection, pause_embeddings: int) -> Corpora:
    """Opens every corpus of `data.prefix` and `data.valid_prefix` with the checks that take constant time.

    Args:
        data: prefixes or blend, and the tokenizer to insist on
        pause_embeddings: K, how many pause ids the run needs, from the reserved one on

    Raises:
        DataError: a corpus is missing, unfinished, damaged, or prepared with another tokenizer than the others or
            than `data.tokenizer`; a corpus that both trains and validates; a pause id that is not free.
    """
    _refuse_torn_prefix("data.prefix", data.prefix)
    _refuse_torn_prefix("data.valid_prefix", data.valid_prefix)
    prefixes, weights = parse_blend(data.prefix) if data.prefix or not data.source else ([], None)
    corpora = tuple(open_corpus(prefix, data.tokenizer) for prefix in prefixes)
    valid_prefixes = parse_blend(data.valid_prefix)[0] if data.valid_prefix else []
    valid = tuple(open_corpus(prefix, data.tokenizer) for prefix in valid_prefixes)
    _refuse_overlap(corpora, valid)
    content = [corpus.manifest.fingerprint for corpus in corpora]
    # One corpus keeps its own fingerprint; a blend is named by a digest of its parts and weights.
    blend = xxhash.xxh3_128_hexdigest(repr((content, weights)).encode())
    fingerprint = content[0] if len(content) == 1 else f"xxh3_128:{blend}"
    tokenizer = require_one_tokenizer(corpora + valid) if corpora + valid else load_tokenizer(data.tokenizer)
    if data.source:
        fingerprint = f"stream/{tokenizer.fingerprint}/eod{tokenizer.eod}/pause{tokenizer.pause_id}"
    tokenizer.check_pause_ids(pause_embeddings)
    for corpus in corpora + valid:
        _check_free_pause_ids(corpus, pause_embeddings)
    return Corpora(corpora, valid, tokenizer, fingerprint)


def _refuse_torn_prefix(key: str, words: Sequence[str]) -> None:
    """Blanks separate the prefixes of a text: say so where a path that holds one was taken for several."""
    missing = [word for word in words if not is_number(word) and not _is_there(word)]
    if len(words) < 2 or not missing:
        return
    meant = _mended(words)
    told = f"{key}: no corpus at {missing[0]}: expected {path_of(missing[0], 'manifest.json')}, which `prepare` writes"
    if torn := [word for word in meant if " " in word and word not in words]:
        told += f". There is one at {torn[0]!r}"
    example = json.dumps(meant if torn else ["PATH WITH BLANKS"], ensure_ascii=False)
    raise DataError(
        f"{told}. Blanks separate prefixes; one whose path holds a blank is given in a list: {example} in YAML, and in "
        f"single quotes on a command line: {key}='{example}'"
    )


def _mended(words: Sequence[str]) -> list[str]:
    """Words joined where they are the path of a corpus together."""
    found, start = [], 0
    while start < len(words):
        stops = range(len(words), start + 1, -1)
        stop = next((stop for stop in stops if _is_there(" ".join(words[start:stop]))), start + 1)
        found.append(" ".join(words[start:stop]))
        start = stop
    return found


def _is_there(prefix: str) -> bool:
    return any(path_of(prefix, extension).exists() for extension in ("manifest.json", "bin", "parts"))


def _check_free_pause_ids(corpus: Corpus, pause_embeddings: int) -> None:
    adoption = corpus.manifest.adoption
    if adoption is None or adoption.free_pause_ids is None or pause_embeddings <= adoption.free_pause_ids:
        return
    used = corpus.tokenizer.pause_id + adoption.free_pause_ids
    raise DataError(
        f"pause.embeddings={pause_embeddings}: expected {adoption.free_pause_ids} or less, id {used} stands in the "
        f"text of {corpus.prefix}. Or adopt it again with --overwrite --pause-id {corpus.tokenizer.vocab_size}"
    )


def _refuse_overlap(corpora: Sequence[Corpus], valid: Sequence[Corpus]) -> None:
    trained = {corpus.manifest.files["bin"].digest: corpus.prefix for corpus in corpora}
    for corpus in valid:
        if (prefix := trained.get(corpus.manifest.files["bin"].digest)) is not None:
            raise DataError(
                f"data.valid_prefix: {corpus.prefix} holds the same documents as {prefix} in data.prefix; a held-out "
                "loss needs documents that are not trained on"
            )


def _warn(message: str) -> None:
    log.warning(message, extra=EVERY_RANK)
