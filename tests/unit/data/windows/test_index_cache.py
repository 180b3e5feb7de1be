"""Cached indices: never those of other documents or of another version, never partial or damaged ones."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.corpora import ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus
from support.prose import documents, small_tokenizer, write_shards
from support.ranks import run_on_ranks

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.windows import index_cache
from pause_megatron.data.windows.build import DatasetOptions, Datasets, build_datasets
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.data.windows.index_cache import IndexCacheError, choose_folder, content_of
from pause_megatron.errors import ConfigError
from pause_megatron.files.digest import file_digest

SAMPLES = 60


def _build(prefix: Sequence[str], cache: str | Path | None, samples: int = SAMPLES, **changes: object) -> Datasets:
    arguments = {"split": "8,2", "sequence_length": 64, "tokenizer": ByteTokenizer(), "seed": 5, "valid_samples": 6}
    cache = None if cache is None else str(cache)
    return build_datasets(
        DatasetOptions(
            prefix, pause=PauseSection(rate=0.2), train_samples=samples, cache=cache, **{**arguments, **changes}
        )
    )


def _windows(datasets: Datasets) -> list[list[int]]:
    parts = (datasets.train, datasets.valid, datasets.valid_without_pauses)
    return [part[number]["tokens"].tolist() for part in parts for number in range(len(part))]


def _keep_times(write: Callable[[], object], prefix: str) -> None:
    """Write a corpus again, as `cp -p` and `rsync -a` do: with the times of the one before."""
    before = {name: os.stat(f"{prefix}.{name}").st_mtime_ns for name in ("bin", "idx")}
    write()
    for name, time in before.items():
        os.utime(f"{prefix}.{name}", ns=(time, time))


@pytest.mark.parametrize("kind", ["alone", "list", "blend", "beside"])
def test_a_corpus_prepared_again_is_never_read_through_its_old_index(tmp_path: Path, kind: str) -> None:
    """Windows are those of an empty cache folder, for every former content under the same name."""
    other = write_corpus(tmp_path / "data" / "other", paragraphs(80)[40:])
    prefix, cache = str(tmp_path / "data" / "corpus"), None if kind == "beside" else tmp_path / "cache"
    blend = {"list": [other, prefix], "blend": ["1", prefix, "3", other]}.get(kind, [prefix])
    texts = list(paragraphs(40))
    numbers = random.Random(1)
    contents = [
        texts,
        texts[:25],  # half of it would never be read
        texts[::-1],  # files of the same sizes
        [text[::-1].copy() for text in texts],  # and of the same lengths
        texts + list(paragraphs(60)[40:]),  # more than the old index knows
        [np.concatenate(texts)[start : start + 500] for start in range(0, 8000, 500)],
        numbers.sample(texts, 40),
        texts,
    ]
    if kind != "alone":
        del contents[4:7]
    write_corpus(Path(prefix), paragraphs(50))
    _build(blend, cache)
    for number, content in enumerate(contents):
        _keep_times(lambda content=content: write_corpus(Path(prefix), content), prefix)
        got = _windows(_build(blend, cache))
        assert got == _windows(_build(blend, tmp_path / f"fresh{number}"))
        shutil.rmtree(tmp_path / f"fresh{number}")


def test_the_same_corpus_is_read_through_the_same_index(tmp_path: Path) -> None:
    """Its content is the key, not its time, its inode or the host: nothing is rebuilt."""
    prefix, cache = str(tmp_path / "corpus"), tmp_path / "cache"
    write_corpus(Path(prefix), paragraphs(40))
    _build([prefix], cache)
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    shutil.copy(f"{prefix}.idx", f"{prefix}.copy")
    os.replace(f"{prefix}.copy", f"{prefix}.idx")
    os.utime(f"{prefix}.bin", ns=(1, 1))
    _build([prefix], cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_caches_are_read_if_they_changed_or_with_verify_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads none of the 2.6 GB of C4, unless they were touched, or with data.verify=always."""
    prefix, cache = write_corpus(tmp_path / "corpus", paragraphs(40)), tmp_path / "cache"
    _build([prefix], cache)
    read: list[Path] = []
    monkeypatch.setattr(index_cache, "file_digest", lambda path: read.append(path) or file_digest(path))
    _build([prefix], cache)
    assert read == []
    _build([prefix], cache, read_cache=True)
    assert {path.name for path in read} == {path.name for path in cache.iterdir() if path.suffix != ".json"}
    shutil.copytree(cache, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.npy"):
        path.touch()
    read.clear()
    _build([prefix], tmp_path / "copy")
    assert read
    read.clear()
    _build([prefix], tmp_path / "copy")
    assert read == []


def test_a_large_prepared_corpus_is_identified_by_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lengths are sampled. Beside an old manifest of other files, all of them are read."""
    monkeypatch.setattr(index_cache, "_CHUNK", 8)
    monkeypatch.setattr(index_cache, "_SAMPLES", 2)
    monkeypatch.setattr(index_cache, "_SAMPLE", 2)
    tokenizer, texts, found = small_tokenizer(tmp_path), documents(60), []

    def content() -> index_cache.Content:
        index = IndexedDataset(str(tmp_path / "corpus"))
        return content_of(str(tmp_path / "corpus"), index.sequence_lengths)

    for part in (texts[:40], [*texts[:20], texts[21], texts[20], *texts[22:40]], texts[20:60], texts[:40]):
        prepare([write_shards(tmp_path / "s", part, 1)], tokenizer, tmp_path / "corpus", workers=1, overwrite=True)
        found.append(content())
    assert found[0] == found[3] and len({each["manifest"] for each in found}) == 3
    manifest = (tmp_path / "corpus.manifest.json").read_bytes()
    for count in (39, 60):
        write_corpus(tmp_path / "corpus", paragraphs(count))
        found.append(content())
        assert found[-1]["manifest"] is None
        (tmp_path / "corpus.manifest.json").write_bytes(manifest[:-9])
        assert content() == found[-1]
        (tmp_path / "corpus.manifest.json").write_bytes(manifest)
    assert len({each["lengths"] for each in found[2:]}) == 4


class _Earlier(GPTDataset):
    """A dataset of an earlier version, whose cache key does not hold the content of the corpus."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "pause_rate", "pause_window", "pause_placement", "pause_seed"]


_Earlier.__name__ = "PauseGPTDataset"


def test_unused_index_files_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix, cache = str(tmp_path / "corpus"), tmp_path / "cache"
    write_corpus(Path(prefix), paragraphs(50))
    config = make_config(prefix, 64, path_to_cache=str(cache))
    old = make_dataset(prefix, config, SAMPLES, cls=_Earlier).unique_description_hash
    strangers = write_corpus(tmp_path / "strangers", paragraphs(9))
    make_dataset(strangers, make_config(strangers, 64, path_to_cache=str(cache)), SAMPLES)
    foreign = make_dataset(prefix, config, SAMPLES, cls=GPTDataset).unique_description_hash  # a Megatron-LM script's
    (cache / "x-PauseGPTDataset-train-description.txt").write_text("[1, 2")

    def messages() -> list[str]:
        text = caplog.text
        caplog.clear()
        assert foreign not in text
        return re.findall(r"not used any more and may be deleted \([\d,]+ bytes\): (.*)\n", text)

    _build([prefix], cache)
    assert messages() == [f"{old}-*"]
    _build([prefix], cache)
    assert messages() == []
    mine = {name.partition("-")[0] for name in os.listdir(cache) if json_of(cache / name).get("dataset_path") == prefix}
    write_corpus(Path(prefix), paragraphs(40))
    _build([prefix], cache)
    (line,) = messages()
    assert set(line.split(", ")) == {f"{key}-*" for key in mine - {foreign}} and len(mine) == 5
    for pattern in line.split(", "):
        assert [path.unlink() for path in cache.glob(pattern)]
    _build([prefix], cache, samples=SAMPLES + 1)
    assert messages() == []


def json_of(path: Path) -> dict:
    return json.loads(path.read_text()) if path.suffix == ".txt" and path.name[0] != "x" else {}


def test_damage_anywhere_in_a_cache_is_repaired(tmp_path: Path, full: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Flipped, truncated, swapped, emptied or deleted files: the windows are right, and the log names the file."""
    prefix, cache = write_corpus(tmp_path / "corpus", paragraphs(50)), tmp_path / "cache"
    right = _windows(_build([prefix], cache))
    files = sorted(cache.iterdir())
    whole = {path: path.read_bytes() for path in files}
    numbers = random.Random(2)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        path.write_bytes(content)

    def swap(path: Path) -> None:
        other = numbers.choice([each for each in files if each.suffix == path.suffix and each != path])
        ours, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: numbers.randrange(path.stat().st_size)])

    harms = [flip, flip, flip, swap, cut, Path.unlink, lambda path: path.write_bytes(b"")]
    for harm, path in itertools.product(harms, files) if full else zip(harms * 5, files * 3, strict=False):
        harm(path)
        altered = path.suffix == ".npy" and path.read_bytes() != whole[path] if path.exists() else False
        assert _windows(_build([prefix], cache)) == right
        logged = caplog.text
        caplog.clear()
        assert f"{path}: digest mismatch; rebuilding the index" in logged or not altered
        assert all(path.read_bytes() == whole[path] for path in files if path.suffix != ".json")


def test_an_index_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at each file: a later start builds the index."""
    prefix, cache, save = write_corpus(tmp_path / "corpus", paragraphs(50)), tmp_path / "cache", np.save
    right = _windows(_build([prefix], tmp_path / "right"))
    for calls in range(3):
        for error in (OSError(errno.ENOSPC, "No space left on device"), OSError("9 requested and 0 written")):
            left = iter(range(calls))

            def full_disk(path: str, array: np.ndarray, left=left, error=error, **options: bool) -> None:
                if next(left, None) is None:
                    Path(path).write_bytes(b"\x93NUMPY half of it")
                    raise error
                save(path, array, **options)

            monkeypatch.setattr(np, "save", full_disk)
            with pytest.raises(ConfigError, match=rf"data.cache: {cache}: cannot write index caches: "):
                _build([prefix], cache)
            assert list(cache.iterdir()) == []
    monkeypatch.undo()
    assert _windows(_build([prefix], cache)) == right


def _killed(prefix: str, cache: Path, calls: int) -> None:
    """Exit while file number `calls` of an index is written."""
    save, left = np.save, iter(range(calls))

    def dies(path: str, array: np.ndarray, **options: bool) -> None:
        if next(left, None) is None:
            Path(path).write_bytes(b"\x93NUMPY half of it")
            os._exit(9)
        save(path, array, **options)

    np.save = dies
    _build([prefix], cache)
    os._exit(0)


def test_a_kill_during_the_build_of_an_index(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", paragraphs(50))
    right = _windows(_build([prefix], tmp_path / "right"))
    for calls in (1, 4):
        cache = tmp_path / f"cache{calls}"
        assert _in_a_child(partial(_killed, prefix, cache, calls)) == 9
        assert _windows(_build([prefix], cache)) == right
    assert len(list(cache.glob("*.building.tmp"))) == 1  # another process may be building there
    for path in cache.glob("*.building.tmp"):
        os.utime(path, (1, 1))
    _build([prefix], cache, samples=SAMPLES + 1)
    assert not list(cache.glob("*.building.tmp"))


def _in_a_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_indices_that_another_process_built(tmp_path: Path) -> None:
    """With Megatron-LM's --dataloader-defer-npy-index-mmap, the index must be there and belong to this corpus."""
    prefix, cache = write_corpus(tmp_path / "corpus", paragraphs(50)), str(tmp_path / "cache")
    lazy = make_config(prefix, 64, path_to_cache=cache, defer_npy_index_mmap=True)
    message = rf"{cache}: expected the index [0-9a-f]+ of this corpus as it is now, got none\. Rank 0 builds it"
    with pytest.raises(IndexCacheError, match=message):
        make_dataset(prefix, lazy, SAMPLES)
    built = make_dataset(prefix, make_config(prefix, 64, path_to_cache=cache), SAMPLES)
    deferred = make_dataset(prefix, lazy, SAMPLES)
    assert len(deferred) == len(built)
    for number in range(len(built)):
        assert torch.equal(deferred[number]["tokens"], built[number]["tokens"])
    (sample_index,) = Path(cache).glob("*-sample_index.npy")
    sample_index.write_bytes(sample_index.read_bytes()[:-8])
    with pytest.raises(IndexCacheError, match="got files that do not fit its record"):
        make_dataset(prefix, lazy, SAMPLES)
    write_corpus(Path(prefix), paragraphs(40))
    with pytest.raises(IndexCacheError, match="got none"):
        make_dataset(prefix, lazy, SAMPLES)


def test_every_rank_ends_with_the_same_error(tmp_path: Path) -> None:
    """A full disk, a file as the folder, a folder per host: no rank hangs, and all errors name data.cache."""
    for name in ("one", "two"):
        write_corpus(tmp_path / name, paragraphs(50))
    (tmp_path / "file").write_text("a file")
    for full, file, host, beside, spare in run_on_ranks(2, endings, str(tmp_path)):
        for message in full:
            assert re.match(r"data\.cache: .*(No space left|expected the index)", message), message
        assert file == f"data.cache={tmp_path}/file: expected a folder to write index caches to, got: a file"
        assert re.match(rf"data\.cache={tmp_path}/host0: expected a folder that all hosts see, .* does not see", host)
        assert (beside, spare) == (str(tmp_path / "cache"), f"{tmp_path}/run/cache")
    assert not list(tmp_path.glob("full*/*")) and len(list(tmp_path.glob("full*"))) == 3


def endings(folder: str) -> list:
    """The outcomes of all cases on this rank."""
    one, two, run = f"{folder}/one", f"{folder}/two", f"{folder}/run"
    blends = ([one], [one, two], ["1", one, "2", two])
    full = [built_on_full_disk(blend, f"{folder}/full{number}") for number, blend in enumerate(blends)]
    outcomes = [full, *(settled(one, run, cache) for cache in (f"{folder}/file", f"{folder}/host{{rank}}", None))]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        Path(folder, "cache").rmdir()  # with the mark gone
        Path(folder, "cache").write_text("a file")
    torch.distributed.barrier()
    return [*outcomes, settled(one, run, None)]


def built_on_full_disk(prefixes: list[str], cache: str) -> str:
    """The error of this rank where no index can be written."""
    from unittest import mock

    with mock.patch.object(np, "save", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))):
        try:
            return str(_build(prefixes, cache))
        except ConfigError as error:
            return str(error)


def settled(prefix: str, run: str, cache: str | None) -> str:
    """The cache folder of this rank, or its error. `{rank}` in the name: another host has another folder there."""
    from unittest import mock

    from pause_megatron.config.load import load
    from pause_megatron.train.inputs.cache_folder import with_cache_folder

    config = load(overrides=[f"data.prefix={prefix}", f"run.dir={run}"])
    rank = torch.distributed.get_rank()
    if cache is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache": cache.format(rank=0)})})
    exists = Path.exists
    elsewhere = mock.patch.object(
        Path, "exists", lambda path: exists(Path(str(path).replace("/host0", f"/host{rank}")))
    )
    with elsewhere:
        try:
            return with_cache_folder(config, prefix).data.cache
        except ConfigError as error:
            return str(error)


def test_choose_folder(tmp_path: Path) -> None:
    """The default beside the corpus; the folder of the run if that is read-only; an error if data.cache is."""
    (tmp_path / "data").mkdir()
    beside, spare = tmp_path / "data" / "corpus", tmp_path / "run" / "cache"
    assert choose_folder(None, beside, spare) == (str(tmp_path / "data" / "cache"), None)
    assert not spare.exists()
    (tmp_path / "data" / "cache").rmdir()
    (tmp_path / "data" / "cache").write_text("a file")
    folder, note = choose_folder(None, beside, spare)
    assert folder == str(spare) and spare.is_dir()
    assert note == (
        f"{tmp_path}/data/cache: cannot be written (a file); index caches go to {spare}. data.cache names another"
    )
    for given in (f"{tmp_path}/data/cache", f"{tmp_path}/data/cache/below", "/proc/nowhere"):
        with pytest.raises(
            ConfigError, match=rf"data\.cache={given}: expected a folder to write index caches to, got: "
        ):
            choose_folder(given, beside, spare)
    spare.rmdir()
    spare.write_text("a file")
    with pytest.raises(ConfigError, match=rf"data\.cache: expected .*{tmp_path}/data/cache: a file; {spare}: a file"):
        choose_folder(None, beside, spare)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may read; those of tmp_path are this user's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_read_only_folder_with_caches_is_used(open_folder: Path) -> None:
    """A shared corpus: a user without write access reads the index in data.cache, and writes others into the run."""
    prefix, cache = write_corpus(open_folder / "data" / "corpus", paragraphs(50)), open_folder / "data" / "cache"
    right = _windows(_build([prefix], cache))
    for path in (open_folder / "data", cache):
        path.chmod(0o755)
    run = open_folder / "run"
    run.mkdir()
    run.chmod(0o777)

    def as_another_user() -> None:
        os.setuid(65534)
        assert not os.access(cache, os.W_OK)
        assert choose_folder(str(cache), prefix, run / "cache") == (str(cache), None)
        assert _windows(_build([prefix], cache)) == right
        with pytest.raises(ConfigError, match=r"data\.cache: .*cannot write index caches: Permission"):
            _build([prefix], cache, samples=SAMPLES + 1)
        folder, note = choose_folder(None, prefix, run / "cache")
        assert folder == str(run / "cache") and "cannot be written (Permission denied)" in note
        assert _windows(_build([prefix], folder)) == right
        os._exit(7)

    assert _in_a_child(as_another_user) == 7
    assert isinstance(_build([prefix], cache).train, PauseGPTDataset)
