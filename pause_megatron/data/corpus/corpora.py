"""The corpora of a run, opened and checked together."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pause_megatron.config.blend import is_number, parse_blend
from pause_megatron.config.schema import DataSection
from pause_megatron.data.corpus.corpus import Corpus, open_corpus, require_one_tokenizer
from pause_megatron.data.corpus.first_use import verify_at_use
from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.side import SideArray, find_side
from pause_megatron.data.corpus.verify import Digested
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.terminal.log import EVERY_RANK
from pause_megatron.terminal.progress import StageProgress, no_report

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpora:
    """The corpora of a run with the tokenizer that they share.

    Attributes:
        corpora: Training corpora, in the order of data.prefix.
        valid: Validation corpora, in the order of data.valid_prefix.
        tokenizer: The tokenizer that all of them share.
        fingerprint: Digest of the content and the weights of the training corpora; it does not depend on their paths.
            With data.source, a fingerprint of the tokenizer only. With data.side, the digests of its arrays too.
        sides: The side array `data.side` of each corpus, those of the validation corpora last; empty without data.side.
    """

    corpora: tuple[Corpus, ...]
    valid: tuple[Corpus, ...]
    tokenizer: Tokenizer
    fingerprint: str
    sides: tuple[SideArray, ...] = ()

    def verify(self, data: DataSection, rank: int = 0) -> None:
        """Read each corpus and side array whole at its first use, as data.verify says.

        Every rank calls this; one of them reads while the others wait. Rank 0 shows the progress of the reading rank.

        Args:
            data: The data section of the configuration.
            rank: Global rank of this process.

        Raises:
            DataError: A corpus or a side array is damaged; raised on every rank.
        """
        with StageProgress(sys.stderr) as progress:
            report = progress.report if rank == 0 else no_report
            read: tuple[Digested, ...] = (*self.corpora, *self.valid, *self.sides)
            for digested in read:
                verify_at_use(digested, data.verify, data.cache, report=report, warn=_warn)

    def require_unchanged(self) -> None:
        """Check that no corpus was replaced between its opening and the memory-mapping of its files.

        Afterwards a corpus may be replaced by another one of its name: a mapped file does not change.

        Raises:
            DataError: A corpus was prepared again in the meantime, or a side array written again.
        """
        for corpus in self.corpora + self.valid:
            if CorpusManifest.load(corpus.prefix).fingerprint != corpus.manifest.fingerprint:
                raise DataError(f"{corpus.prefix}: prepared again while this run was opening it. Start the run again")
        for side in self.sides:
            if CorpusManifest.load(side.prefix).sides.get(side.name) != side.record:
                raise DataError(f"{side.path}: written again while this run was opening it. Start the run again")

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, with pauses as `<pause>` and ends of documents as `<eod>`."""
        return self.tokenizer.decode(ids, eod_text="<eod>\n")


def open_corpora(data: DataSection, pause_embeddings: int) -> Corpora:
    """Open every corpus of `data.prefix` and `data.valid_prefix`, with all checks that take constant time.

    Args:
        data: The data section of the configuration: prefixes or a blend, and the tokenizer if one is required.
        pause_embeddings: K, number of pause ids that the run needs, from the reserved one on.

    Returns:
        The opened corpora, their tokenizer and their fingerprint.

    Raises:
        DataError: A corpus is missing, unfinished, damaged, or of another tokenizer than the others or
            `data.tokenizer`; a corpus is both in data.prefix and in data.valid_prefix; a pause id is not free; or a
            corpus has no side array `data.side`, or a damaged one.
    """
    _refuse_split_prefix("data.prefix", data.prefix)
    _refuse_split_prefix("data.valid_prefix", data.valid_prefix)
    prefixes, weights = parse_blend(data.prefix) if data.prefix or not data.source else ([], None)
    corpora = tuple(open_corpus(prefix, data.tokenizer) for prefix in prefixes)
    valid_prefixes = parse_blend(data.valid_prefix)[0] if data.valid_prefix else []
    valid = tuple(open_corpus(prefix, data.tokenizer) for prefix in valid_prefixes)
    _refuse_overlap(corpora, valid)
    content = [corpus.manifest.fingerprint for corpus in corpora]
    # A single corpus keeps its own fingerprint; a blend has a digest of its parts and weights.
    blend = bytes_digest(repr((content, weights)).encode())
    fingerprint = content[0] if len(content) == 1 else blend
    if corpora + valid:
        tokenizer = require_one_tokenizer(corpora + valid)
    elif data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        raise DataError("data.tokenizer: expected a tokenizer for data.source, got none")
    if data.source:
        fingerprint = f"stream/{tokenizer.fingerprint}/eod{tokenizer.eod}/pause{tokenizer.pause_id}"
    tokenizer.check_pause_ids(pause_embeddings)
    for corpus in corpora + valid:
        _check_free_pause_ids(corpus, pause_embeddings)
    sides: tuple[SideArray, ...] = ()
    if data.side is not None:
        sides = tuple(find_side(corpus.prefix, data.side, corpus.manifest) for corpus in corpora + valid)
        # Other values place other pauses or weigh otherwise: a run with them is another run.
        fingerprint = "/".join([fingerprint, *(f"side {side.record.file.digest}" for side in sides[: len(corpora)])])
    return Corpora(corpora, valid, tokenizer, fingerprint, sides)


def _refuse_split_prefix(key: str, words: Sequence[str]) -> None:
    """Raise an error where a path that contains blanks was split into several prefixes."""
    missing = [word for word in words if not is_number(word) and not _exists(word)]
    if len(words) < 2 or not missing:
        return
    rejoined = _rejoin(words)
    message = f"{key}: no corpus at {missing[0]}: expected {path_of(missing[0], 'manifest.json')} of `prepare`"
    if with_blanks := [word for word in rejoined if " " in word and word not in words]:
        message += f". There is one at {with_blanks[0]!r}"
    example = json.dumps(rejoined if with_blanks else ["PATH WITH BLANKS"], ensure_ascii=False)
    raise DataError(
        f"{message}. Blanks separate prefixes. Write a path that contains blanks in a list: {example} in YAML, and in "
        f"single quotes on a command line: {key}='{example}'"
    )


def _rejoin(words: Sequence[str]) -> list[str]:
    """Return the words, joined by blanks where together they are the path of a corpus."""
    found, start = [], 0
    while start < len(words):
        stops = range(len(words), start + 1, -1)
        stop = next((stop for stop in stops if _exists(" ".join(words[start:stop]))), start + 1)
        found.append(" ".join(words[start:stop]))
        start = stop
    return found


def _exists(prefix: str) -> bool:
    return any(path_of(prefix, extension).exists() for extension in ("manifest.json", "bin", "parts"))


def _check_free_pause_ids(corpus: Corpus, pause_embeddings: int) -> None:
    adoption = corpus.manifest.adoption
    if adoption is None or adoption.free_pause_ids is None or pause_embeddings <= adoption.free_pause_ids:
        return
    used = corpus.tokenizer.pause_id + adoption.free_pause_ids
    raise DataError(
        f"pause.embeddings: expected {adoption.free_pause_ids} or less, since id {used} occurs in {corpus.prefix}, got "
        f"{pause_embeddings}. Or adopt the corpus again with --overwrite --pause-id {corpus.tokenizer.vocab_size}"
    )


def _refuse_overlap(corpora: Sequence[Corpus], valid: Sequence[Corpus]) -> None:
    trained = {corpus.manifest.files["bin"].digest: corpus.prefix for corpus in corpora}
    for corpus in valid:
        if (prefix := trained.get(corpus.manifest.files["bin"].digest)) is not None:
            raise DataError(
                f"data.valid_prefix: expected documents that are not trained on, got {corpus.prefix}, which has the "
                f"same documents as {prefix} in data.prefix"
            )


def _warn(message: str) -> None:
    log.warning(message, extra=EVERY_RANK)
