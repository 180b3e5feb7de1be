"""PauseGPTDataset against GPTDataset, against a plain loop, and over whole epochs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from support.corpora import EOD, ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus

from pause_megatron.data.windows.boundaries import document_begins, packed_documents, restarting_positions, segments_of
from pause_megatron.data.windows.dataset import PauseGPTDataset, PauseTokenizer
from pause_megatron.data.windows.pause import Window, inject
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.model.attention import segment_mask

PAUSE = ByteTokenizer.pause_id
EOD_OPTIONS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "speeches", paragraphs(40))


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of a few words, so that windows hold many ends of documents, also side by side."""
    words = [document[:9] for document in paragraphs(60)]
    documents = [np.append(word[: 1 + number % 9], EOD) for number, word in enumerate(words)]
    documents += [np.array([EOD])] * 3
    return write_corpus(tmp_path_factory.mktemp("short") / "short", documents)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].is_contiguous(), name
        assert torch.equal(left[name], right[name]), name


def expected_sample(dataset: PauseGPTDataset, sample: int) -> dict[str, torch.Tensor]:
    """The sample by its definition, token by token: Goyal et al., section 3.1, and the docstring of PauseGPTDataset."""
    config, plan = dataset.config, dataset.injector.plan
    text = dataset.window_text(sample)
    gaps = dataset.injector.gaps(text, sample).tolist()
    window: list[tuple[int, int]] = []  # (token, number of the text token it is or stands behind)
    for number, token in enumerate(text.tolist()):
        window.append((token, number))
        window += [(PAUSE + index % len(dataset.injector.pause_ids), number) for index in range(gaps.count(number + 1))]
    window = window[: plan.sequence_length + 1]
    document, documents = 0, []
    for number in range(text.size):
        document += number > 0 and text[number - 1] == EOD
        documents.append(document)

    tokens, labels, loss_mask = [], [], []
    for (token, _), (target, number) in itertools.pairwise(window):
        is_target = 0 <= target < PAUSE
        tokens.append(max(token, 0))
        labels.append(target if is_target else 0)
        loss_mask.append(float(is_target and not (config.eod_mask_loss and text[number - 1] == EOD)))
    of_token = [documents[number] for _, number in window[:-1]]
    position_ids = [
        place - (of_token.index(of_token[place]) if config.reset_position_ids else 0) for place in range(len(tokens))
    ]
    hidden = [
        [
            key > query or (config.reset_attention_mask and of_token[key] != of_token[query])
            for key in range(len(tokens))
        ]
        for query in range(len(tokens))
    ]
    sample = {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels)}
    if config.create_attention_mask:
        sample["attention_mask"] = torch.tensor([hidden], dtype=torch.bool)
    sample |= {"loss_mask": torch.tensor(loss_mask), "position_ids": torch.tensor(position_ids)}
    if config.document_segments:
        sample["segments"] = torch.tensor(of_token, dtype=torch.int32)
    return sample


@pytest.mark.parametrize("options", [*itertools.product((False, True), repeat=4)])
def test_rate_zero_is_gpt_dataset(short_documents: str, options: tuple[bool, ...]) -> None:
    """Invariant 5: bit for bit, for every option, in either window."""
    chosen = dict(zip((*EOD_OPTIONS, "create_attention_mask"), options, strict=True))
    for window in ("exact", "trim"):
        config = make_config(short_documents, 33, pause_rate=0.0, pause_window=window, **chosen)
        ours = make_dataset(short_documents, config, 20)
        stock = make_dataset(short_documents, config, 20, cls=GPTDataset)
        assert len(ours) == len(stock) >= 20
        for sample in [*range(len(stock)), None]:
            assert_same(ours[sample], stock[sample])


def test_segments_without_pauses(short_documents: str) -> None:
    """The sample of GPTDataset with positions reset, and the documents that its own mask separates."""
    reset = {"reset_position_ids": True, "reset_attention_mask": True}
    config = make_config(short_documents, 33, pause_rate=0.0, document_segments=True, **reset)
    ours = make_dataset(short_documents, config, 20)
    with_mask = make_config(short_documents, 33, create_attention_mask=True, **reset)
    stock = make_dataset(short_documents, with_mask, 20, cls=GPTDataset)
    for sample in [*range(len(stock)), None]:
        found, expected = ours[sample], stock[sample]
        segments, mask = found.pop("segments"), expected.pop("attention_mask")
        assert_same(found, expected)
        assert segments.dtype == torch.int32
        assert torch.equal(segment_mask(segments[None])[0], mask)


def test_pauses_around_an_end_of_document() -> None:
    """A run of pauses behind an EOD belongs to the document that the EOD ends."""
    text = np.array([5, EOD, EOD, 6, 7, EOD, 8])
    window = inject(text, np.array([1, 2, 2, 3, 6, 6]), range(PAUSE, PAUSE + 2))
    names = {EOD: "e", PAUSE: "p", PAUSE + 1: "q"}
    assert "".join(names.get(token, str(token)) for token in window.tokens.tolist()) == "5pepqep67epq8"
    begins = document_begins(window, EOD)
    assert np.flatnonzero(begins).tolist() == [5, 7, 12]
    positions = restarting_positions(begins)
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 0]
    assert segments_of(positions).tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3]


def packed(lengths: list[int], window: Window) -> list[int]:
    """`cu_seqlens` without its filling, token by token."""
    documents = [number for number, length in enumerate(lengths) for _ in range(length)]
    documents += [documents[-1]] * window.tokens.size  # padding
    of_token, text = [], -1
    for is_text in window.is_text.tolist():
        text += is_text
        of_token.append(documents[text])
    of_token.pop()  # only a target
    begins = [0] + [at for at in range(1, len(of_token)) if of_token[at] != of_token[at - 1]]
    return [*begins, len(of_token)]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 2),
    padding=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=200)
def test_packed_documents(lengths: list[int], padding: int, data: st.DataObject) -> None:
    """Pauses count to the document of the token before them; cut windows, documents without a token, padding."""
    text = np.arange(sum(lengths) + padding)
    gaps = np.sort(data.draw(st.lists(st.integers(1, text.size), max_size=12))).astype(np.int64)
    window = inject(text, gaps, range(500, 501), data.draw(st.integers(2, text.size + gaps.size)))
    found, size = packed_documents(window, lengths), window.tokens.size - 1
    bounds = packed(lengths, window)
    assert found["cu_seqlens"].dtype == found["max_seqlen"].dtype == torch.int32
    assert found["cu_seqlens"].tolist() == bounds + [size] * (size + 1 - len(bounds))
    assert found["max_seqlen"].item() == max(np.diff(bounds))
    positions = [at - max(bound for bound in bounds if bound <= at) for at in range(size)]
    assert found["position_ids"].tolist() == positions


HAS_PACKING = "inter_document_masking" in {field.name for field in dataclasses.fields(GPTDatasetConfig)}


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("create_attention_mask", [False, True])
def test_documents_packed_for_attention(short_documents: str, rate: float, create_attention_mask: bool) -> None:
    """`inter_document_masking`: without pauses GPTDataset's sample bit for bit, with them the same keys."""
    options = {"create_attention_mask": create_attention_mask, "eod_mask_loss": True, "pause_rate": rate}
    if not HAS_PACKING:
        with pytest.raises(TypeError, match="inter_document_masking"):  # no release takes the option and ignores it
            make_config(short_documents, 33, inter_document_masking=True, **options)
        return
    config = make_config(short_documents, 33, inter_document_masking=True, **options)
    plain = make_dataset(short_documents, make_config(short_documents, 33, **options), 20)
    ours = make_dataset(short_documents, config, 20)
    stock = make_dataset(short_documents, config, 20, cls=GPTDataset)
    for sample in [*range(20), None]:
        item, expected = ours[sample], stock[sample]
        if rate == 0:
            assert_same(item, expected)
            continue
        assert [(name, tensor.dtype, tensor.shape) for name, tensor in item.items()] == [
            (name, tensor.dtype, tensor.shape) for name, tensor in expected.items()
        ]
        for name in ("tokens", "labels", "loss_mask"):
            assert torch.equal(item[name], plain[sample][name]), name
        text, lengths = ours.text_and_lengths(sample or 0)
        window = ours.injector(text, sample or 0)
        bounds = packed(lengths, window)
        ended = np.flatnonzero(document_begins(window, EOD)[:-1]).tolist()  # each document has its EOD
        assert item["cu_seqlens"].unique().tolist() == bounds == [0, *ended, 33]


def test_rate_zero_is_gpt_dataset_with_padding(short_documents: str) -> None:
    config = make_config(short_documents, 64, pause_rate=0.0, drop_last_partial_validation_sequence=False)
    ours = make_dataset(short_documents, config, split=Split.valid)
    stock = make_dataset(short_documents, config, split=Split.valid, cls=GPTDataset)
    assert any((sample["loss_mask"] == 0).any() for sample in stock)
    for sample in range(len(stock)):
        assert_same(ours[sample], stock[sample])


@st.composite
def settings_of_a_dataset(draw: st.DrawFn) -> dict[str, object]:
    window = draw(st.sampled_from(["exact", "trim"]))
    placements = ["uniform", "isolated", "with_replacement", "interval"] + ["bernoulli"] * (window == "trim")
    options = {name: draw(st.booleans()) for name in (*EOD_OPTIONS, "create_attention_mask")}
    return {
        **options,
        "document_segments": options["reset_position_ids"] and draw(st.booleans()),
        "sequence_length": draw(st.integers(8, 90)),
        "pause_rate": draw(st.floats(0.07, 0.45)),
        "pause_window": window,
        "pause_placement": draw(st.sampled_from(placements)),
        "pause_seed": draw(st.integers(0, 2**40)),
        "embeddings": draw(st.integers(1, 3)),
        "drop_last_partial_validation_sequence": draw(st.booleans()),
    }


@given(chosen=settings_of_a_dataset())
@settings(max_examples=60)
def test_samples_follow_the_definition(short_documents: str, chosen: dict[str, object]) -> None:
    """All policies x windows x rates x K x end-of-document options, with a padded last sequence where there is one."""
    dataset = make_dataset(short_documents, make_config(short_documents, **chosen), split=Split.valid)
    for sample in {0, len(dataset) // 2, *range(max(0, len(dataset) - 3), len(dataset))}:
        assert_same(dataset[sample], expected_sample(dataset, sample))


@given(chosen=settings_of_a_dataset())
@settings(max_examples=60)
def test_invariants(corpus: str, chosen: dict[str, object]) -> None:
    chosen["create_attention_mask"] = False
    dataset = make_dataset(corpus, make_config(corpus, **{**chosen, "eod_mask_loss": False}))
    for sample in range(0, len(dataset), max(1, len(dataset) // 5)):
        text = dataset.window_text(sample)
        item = dataset[sample]
        is_pause = item["tokens"] >= PAUSE
        supervised = item["loss_mask"] == 1
        inputs = item["tokens"][~is_pause]
        # 1: the pauses removed, it is the text.
        assert inputs.tolist() == text[: inputs.numel()].tolist()
        # 2: every text token but the first is a target once, in order.
        targets = item["labels"][supervised]
        assert targets.tolist() == text[1 : 1 + targets.numel()].tolist()
        assert targets.numel() >= inputs.numel() - 1
        if chosen["pause_window"] == "exact":
            assert targets.numel() == text.size - 1
        # 3: no target, nor any label, is a pause; what is not supervised is 0.
        assert (item["labels"] < PAUSE).all()
        assert (item["labels"][~supervised] == 0).all()


def test_exact_windows_lose_no_text(corpus: str) -> None:
    """The windows of one epoch, in corpus order, give the corpus back, each overlapping the next by one token."""
    dataset = make_dataset(corpus, make_config(corpus, 128, pause_rate=0.2))
    stream = np.concatenate([paragraphs(40)[number] for number in dataset.document_index])
    in_order = np.argsort(dataset.shuffle_index)
    text: list[int] = []
    for sample in in_order:
        item = dataset[int(sample)]
        text += item["labels"][item["loss_mask"] == 1].tolist()
    assert text == stream[1 : 1 + len(text)].tolist()
    assert len(stream) - len(text) <= dataset.injector.plan.text_length
    assert len(text) == len(dataset) * (dataset.injector.plan.text_length - 1)


def test_samples_are_independent_of_how_they_are_read(corpus: str) -> None:
    """Invariant 4: order of access, other readers, worker processes, the folder of the corpus."""
    config = make_config(corpus, 64, pause_rate=0.25)
    dataset = make_dataset(corpus, config, 50)
    first = [dataset[sample] for sample in range(50)]
    again = make_dataset(corpus, config, 50)
    for sample in np.random.default_rng(0).permutation(50).tolist():
        assert_same(again[sample], first[sample])
        assert_same(again[np.int64(sample)], first[sample])
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(50), num_workers=2)
    for sample, item in enumerate(loader):
        assert_same(item, first[sample])


def test_a_corpus_can_be_moved_but_not_renamed(corpus: str, tmp_path: Path) -> None:
    moved = write_corpus(tmp_path / "elsewhere" / Path(corpus).name, paragraphs(40))
    renamed = write_corpus(tmp_path / "other_name", paragraphs(40))
    samples = [make_dataset(prefix, make_config(prefix, 64), 20)[13] for prefix in (corpus, moved, renamed)]
    assert_same(samples[0], samples[1])
    assert not torch.equal(samples[0]["tokens"], samples[2]["tokens"])


def test_another_epoch_draws_other_places(tmp_path: Path) -> None:
    """A document that windows divide evenly is cut into the same texts in each epoch, but the pauses move."""
    text_length = 64 + 1 - 16
    document = paragraphs(1)[0][: 1 * (text_length - 1)]
    prefix = write_corpus(tmp_path / "one", [document])
    dataset = make_dataset(prefix, make_config(prefix, 64, pause_rate=0.25), 10)
    texts = [dataset.window_text(sample).tolist() for sample in range(10)]
    assert all(text == texts[0] for text in texts)
    assert len({tuple((dataset[sample]["tokens"] >= PAUSE).tolist()) for sample in range(10)}) == 10


def test_splits_draw_other_places(corpus: str) -> None:
    config = make_config(corpus, 64)
    train, valid = (make_dataset(corpus, config, 5, split=split) for split in (Split.train, Split.valid))
    assert not torch.equal(train[0]["tokens"], valid[0]["tokens"])


def test_shared_tensors_stay_as_they_are(short_documents: str) -> None:
    for option in (None, *EOD_OPTIONS):
        chosen = {option: True} if option else {}
        config = make_config(short_documents, 40, create_attention_mask=True, pause_rate=0.2, **chosen)
        dataset = make_dataset(short_documents, config, 15)
        kept = [dataset[sample] for sample in range(15)]
        copies = copy.deepcopy(kept)
        for sample in [None, *range(15)]:
            dataset[sample]
        for left, right in zip(kept, copies, strict=True):
            assert_same(left, right)


def test_filler_sample_has_no_targets(corpus: str) -> None:
    dataset = make_dataset(corpus, make_config(corpus, 64), 5)
    filler, first = dataset[None], dataset[0]
    assert not filler["loss_mask"].any()
    assert torch.equal(filler["tokens"], first["tokens"])


def test_numbers_outside_the_dataset(corpus: str) -> None:
    dataset = make_dataset(corpus, make_config(corpus, 64), 5)
    assert_same(dataset[-1], dataset[len(dataset) - 1])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_settings_are_in_the_cache_key(corpus: str) -> None:
    base = {"pause_rate": 0.1, "pause_window": "trim", "pause_placement": "uniform", "pause_seed": 1, "embeddings": 1}
    changes = {
        "pause_rate": 0.2,
        "pause_window": "exact",
        "pause_placement": "bernoulli",
        "pause_seed": 2,
        "embeddings": 2,
    }
    keys = {make_dataset(corpus, make_config(corpus, 64, **base), 5).unique_description_hash}
    masking = {
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "document_segments": True,
        "eod_mask_loss": True,
    }
    keys.add(make_dataset(corpus, make_config(corpus, 64, **base, **masking), 5).unique_description_hash)
    assert len(keys) == 1  # what is cached are text windows, which EOD has no part in
    for name, value in changes.items():
        keys.add(make_dataset(corpus, make_config(corpus, 64, **{**base, name: value}), 5).unique_description_hash)
    assert len(keys) == 1 + len(changes)


def test_configuration_is_not_changed(corpus: str) -> None:
    config = make_config(corpus, 64)
    before = copy.copy(config)
    dataset = make_dataset(corpus, config, 5)
    assert config == before
    assert dataset.config.sequence_length == 64 - 6


def test_a_split_without_text_is_refused(tmp_path: Path) -> None:
    """megatron-core would count epochs of nothing forever."""
    prefix = write_corpus(tmp_path / "corpus", paragraphs(2))
    config = make_config(prefix, 64)
    low_level = make_dataset(prefix, config, 1).dataset
    with pytest.raises(DataError, match="expected text in the valid split, got no token in its 0 documents"):
        PauseGPTDataset(low_level, prefix, np.arange(0, dtype=np.int32), 5, Split.valid, config)


def test_a_split_is_looked_at_to_its_end_for_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece: text in the last document alone is text, and empty documents alone are none."""
    monkeypatch.setattr("pause_megatron.data.windows.dataset._CHUNK", 2)
    empty = np.array([], dtype=np.int64)
    prefix = write_corpus(tmp_path / "corpus", [empty] * 6 + [paragraphs(1)[0]])
    low_level, config = IndexedDataset(prefix), make_config(prefix, 64)
    dataset = PauseGPTDataset(low_level, prefix, np.arange(7, dtype=np.int32), 1, Split.train, config)
    assert set(dataset.document_index.tolist()) == set(range(7)) and dataset.indices is None
    with pytest.raises(DataError, match="got no token in its 6 documents"):
        PauseGPTDataset(low_level, prefix, np.arange(6, dtype=np.int32), 1, Split.train, config)


def test_a_corpus_with_a_pause_id_is_refused(tmp_path: Path) -> None:
    document = paragraphs(1)[0].copy()
    document[5] = PAUSE
    prefix = write_corpus(tmp_path / "corpus", [document])
    dataset = make_dataset(prefix, make_config(prefix, 128), 3)
    with pytest.raises(DataError, match=rf"corpus\.bin: expected text only, got the pause id {PAUSE}"):
        [dataset[sample] for sample in range(len(dataset))]


def test_a_corpus_smaller_than_a_window_is_repeated(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "tiny", [paragraphs(1)[0][:5]])
    dataset = make_dataset(prefix, make_config(prefix, 64), 3)
    assert len(dataset) >= 3
    assert_same(dataset[2], expected_sample(dataset, 2))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"tokenizer": ByteTokenizer()}, "tokenizer: expected a PauseTokenizer.*got a ByteTokenizer"),
        ({"add_extra_token_to_sequence": False}, "add_extra_token_to_sequence: expected True"),
        ({"pause_rate": 0.995}, "expected at least 2 text tokens"),
        ({"pause_placement": "bernoulli"}, "expected pause.window=trim with bernoulli"),
        ({"document_segments": True}, "document_segments: expected reset_position_ids=True"),
    ],
)
def test_configurations_that_cannot_be_run(corpus: str, chosen: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(corpus, 64, **chosen)


class Padded(ByteTokenizer):
    pad = 300
    vocab_size = 301
    unique_identifiers: ClassVar = OrderedDict(kind="padded")
    special_tokens_dict: ClassVar = OrderedDict(pad_token=300, eod_token=EOD)


def test_mock_data() -> None:
    """megatron-core's own class takes the configuration; ours says that it has no text to put pauses in."""
    config = make_config("corpus", 64, blend=None, split=None, path_to_cache=None)
    assert config.mock
    low_level = MockGPTDataset.build_low_level_dataset(None, config)
    mock = MockGPTDataset(low_level, None, np.arange(9), 5, Split.train, config)
    assert mock[0]["tokens"].shape == (64,)
    with pytest.raises(ConfigError, match=r"blend: expected prefixes of corpora, got none.*MockGPTDataset"):
        PauseGPTDataset.build_low_level_dataset(None, config)


def test_a_padding_id_in_the_text_is_treated_as_gpt_dataset_does(tmp_path: Path) -> None:
    document = paragraphs(1)[0].copy()
    document[10:200:7] = Padded.pad
    prefix = write_corpus(tmp_path / "padded", [document])
    tokenizer = PauseTokenizer(Padded(), pause_id=400)
    stock = make_dataset(prefix, make_config(prefix, 180, tokenizer=tokenizer), 2, cls=GPTDataset)
    ours = make_dataset(prefix, make_config(prefix, 200, tokenizer=tokenizer, pause_rate=0.1), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        item, plain = ours[0], stock[0]
    is_pause = item["tokens"] == 400
    assert torch.equal(item["tokens"][~is_pause][:180], plain["tokens"][: int((~is_pause).sum())])
    assert item["labels"][item["loss_mask"] == 1].tolist() == plain["labels"][plain["loss_mask"] == 1].tolist()
