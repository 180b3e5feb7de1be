"""The files of a preparation at PREFIX and in PREFIX.parts/, and the parts of earlier runs that it can reuse."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.manifest import CorpusManifest, path_of
from pause_megatron.data.corpus.records import CorpusSpec, read_record
from pause_megatron.data.prepare.joined import JoinedFile
from pause_megatron.data.prepare.publish import remove_partial_files
from pause_megatron.data.prepare.shard import PartRecord, part_path
from pause_megatron.data.text.sources import Source
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.durable import write_whole

SPEC_NAME = "plan.json"
"""File in PREFIX.parts/ that holds the spec of the corpus."""


class Workspace:
    """PREFIX and PREFIX.parts/, and what this run may reuse of an earlier run.

    Args:
        output: PREFIX of the corpus.
        spec: Spec of the corpus.
        sources: Sources of the corpus, in order.
    """

    def __init__(self, output: str | Path, spec: CorpusSpec, sources: Sequence[Source]) -> None:
        self.output = output
        self.spec = spec
        self.sources = sources
        self.folder = path_of(output, "parts")

    def complete(self) -> CorpusManifest | None:
        """Return the manifest of a complete corpus of the same spec, or None if there is no corpus.

        Raises:
            DataError: There is a damaged corpus, one of another spec or of sources that have changed since, or a
                `.bin` or `.idx` without a manifest.
        """
        if not path_of(self.output, "manifest.json").exists():
            self._refuse_foreign_files()
            return None
        manifest = CorpusManifest.load(self.output)
        spec = manifest.spec
        if spec is None:
            raise DataError(
                f"corpus {self.output}: expected one of `prepare` or none, got an adopted corpus; name another "
                "--output, or replace it with --overwrite"
            )
        self._refuse_differences(spec, f"corpus {self.output}: there is a corpus already")
        for source, record in zip(self.sources, manifest.sources, strict=True):
            if not source.unchanged(record.stamp, record.digest):
                raise DataError(
                    f"corpus {self.output}: {source.name} has changed since the corpus was prepared; prepare it again "
                    "with --overwrite, or name another --output"
                )
        open_corpus(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    def open(self, tokenizer: Tokenizer, *, overwrite: bool) -> dict[int, PartRecord]:
        """Create or reuse PREFIX.parts/ and return its finished parts by number.

        Args:
            tokenizer: Tokenizer of the corpus, which is saved for the workers.
            overwrite: Whether parts of another spec may be removed.

        Raises:
            DataError: There are parts of another spec.
        """
        spec_path = self.folder / SPEC_NAME
        if spec_path.exists():
            found = read_record(spec_path, CorpusSpec)
            if found != self.spec:
                if any(self.folder.glob("[0-9]*.json")) and not overwrite:
                    self._refuse_differences(found, f"{self.folder}: there is an unfinished preparation")
                shutil.rmtree(self.folder)
        if not spec_path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            tokenizer.save(self.folder / "tokenizer")
            write_whole(spec_path, self.spec.model_dump_json().encode())
        remove_partial_files(self.output, self.folder)
        return self._finished_parts()

    def close(self) -> None:
        """Remove unfinished files, and PREFIX.parts/ if it has no finished part."""
        remove_partial_files(self.output, self.folder)
        if self.folder.exists() and not any(self.folder.glob("[0-9]*.json")):
            shutil.rmtree(self.folder)

    def _finished_parts(self) -> dict[int, PartRecord]:
        joined_file = JoinedFile(self.folder)
        joined = joined_file.recover(self.output)
        finished: dict[int, PartRecord] = {}
        for number, source in enumerate(self.sources):
            part = self._finished_part(number, source, number < joined)
            if part is None:
                joined = min(joined, number)
                part_path(self.folder, number, "json").unlink(missing_ok=True)
            else:
                finished[number] = part
        joined_file.keep([finished[number] for number in range(joined)])
        return finished

    def _finished_part(self, number: int, source: Source, joined: bool) -> PartRecord | None:
        path = part_path(self.folder, number, "json")
        if not path.exists():
            return None
        part = read_record(path, PartRecord)
        for extension, record in (("bin", part.bin), ("idx", part.idx)):
            file = path.with_suffix(f".{extension}")
            if extension == "bin" and joined:
                continue  # its bytes are in joined.bin
            if not file.is_file() or file.stat().st_size != record.bytes:
                return None
        return part if source.unchanged(part.source.stamp, part.source.digest) else None

    def _refuse_foreign_files(self) -> None:
        foreign = [path_of(self.output, name) for name in ("bin", "idx") if path_of(self.output, name).exists()]
        if foreign and not (self.folder / SPEC_NAME).exists():
            raise DataError(
                f"{foreign[0]}: expected a corpus of `prepare` or no file, got a file without a manifest; name another "
                f"--output, replace it with --overwrite, or keep it with `pause-megatron adopt {self.output} "
                "--tokenizer T`"
            )

    def _refuse_differences(self, found: CorpusSpec, message: str) -> None:
        if differences := found.differences(self.spec):
            raise DataError(
                f"{message}, of other sources or options; name another --output, or replace it with --overwrite. The "
                "differences:\n  " + "\n  ".join(differences)
            )
