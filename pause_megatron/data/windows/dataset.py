"""Pauses in megatron-core's own GPT dataset. Works under the stock BlendedMegatronDatasetBuilder; patches nothing.

Imports megatron-core's datasets only: neither DeepSpeed nor this project's model.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.tokenizer.pause_tokenizer import NO_PAD, PauseTokenizer
from pause_megatron.data.windows.boundaries import document_begins, packed_documents, restarting_positions, segments_of
from pause_megatron.data.windows.index_cache import Content, IndexCache, content_of
from pause_megatron.data.windows.model_rows import check_model_rows
from pause_megatron.data.windows.pause import PauseInjector, PausePlan, Window
from pause_megatron.errors import ConfigError, DataError

__all__ = ["PauseGPTDataset", "PauseGPTDatasetConfig", "PauseTokenizer"]

_PIECE = 1 << 20  # documents looked at together


@dataclass
class PauseGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig plus pauses. `sequence_length` counts the pauses in. `tokenizer` must be a PauseTokenizer.

    Raises:
        ConfigError: see PausePlan; a tokenizer without `pause_ids`; or a model without a row for each of them.
    """

    pause_rate: float = 0.1
    """Pauses inserted, as a fraction of sequence_length; 0: none, and samples are GPTDataset's, bit for bit"""

    pause_window: str = "exact"
    """exact: fewer text tokens are drawn and none is lost; trim: the paper's, cut after insertion"""

    pause_placement: str = "uniform"
    """uniform, isolated, with_replacement, bernoulli, interval, or 'module:attribute' of a PlacementPolicy"""

    pause_seed: int = 1234
    """Seed of the places, independent of random_seed"""

    model_vocab_size: int | None = None
    """Rows of the model's embedding, padding included (Megatron-LM's args.padded_vocab_size). Too few are refused.
       None: those of the Megatron-LM that runs in this process, if one does; else nobody can check them, and a
       warning says so"""

    document_segments: bool = False
    """Add segments int32 [N] to a sample: its documents, numbered from 0. What attention by spans, or a model
       that makes its own mask, needs in place of an attention_mask [1, N, N]. With reset_position_ids only"""

    window_cache_path: str | None = None
    """Folder of the window indices, if not path_to_cache. BlendedDataset can use path_to_cache only inside a process
       group; windows can be cached without one, here."""

    read_index_cache: bool = False
    """Compare cached indices with their digests byte by byte at each start, not only after they were changed"""

    corpus_content: Content | None = field(init=False, default=None)
    """What is in the corpus. Each dataset fills it in for itself: part of the key of its index cache"""

    pause_plan: PausePlan | None = field(init=False, default=None)
    """The pause settings together with what follows from them. Made from the others"""

    def __post_init__(self) -> None:
        """Checks the pause settings, after megatron-core has checked its own."""
        super().__post_init__()
        if not isinstance(getattr(self.tokenizer, "pause_ids", None), range):
            raise ConfigError(
                f"tokenizer: expected a PauseTokenizer, which has the pause ids, got a {type(self.tokenizer).__name__}"
            )
        if not self.add_extra_token_to_sequence:
            raise ConfigError("add_extra_token_to_sequence: expected True; a window's last target is its extra token")
        if self.document_segments and not self.reset_position_ids:
            raise ConfigError("document_segments: expected reset_position_ids=True with it, got False")
        if self.token_dtype_code is not None:
            # The .bin holds text ids only: its type follows from the text vocabulary, which pauses must not enlarge.
            self.token_dtype_code = 4 if self.tokenizer.text_size > np.iinfo(np.uint16).max + 1 else 8
        self.pause_plan = PausePlan(
            self.sequence_length, self.pause_rate, self.pause_window, self.pause_placement, self.pause_seed
        )
        if self.pause_plan.count:
            check_model_rows(self.tokenizer.pause_ids, self.model_vocab_size)


class PauseGPTDataset(GPTDataset):
    """GPTDataset whose windows hold pauses.

    A sample has GPTDataset's keys, shapes and types: tokens, labels, position_ids int64 [N], loss_mask float32 [N] and,
    if asked for, attention_mask bool [1, N, N] (True: hidden); with `inter_document_masking` (megatron-core 0.19) also
    cu_seqlens int32 [N + 1] and max_seqlen int32 []. `document_segments` adds segments int32 [N]. Where the next token
    is a pause, the label is 0 and the loss mask 0, as GPTDataset does for padding: the mask alone is enough to be
    correct, and no label is a pause id.

    Documents: what GPTDataset derives from EOD is decided on the text, before pauses exist. A pause belongs to the
    text token that it stands behind. So with `eod_mask_loss` the first token after an EOD stays unsupervised, however
    many pauses stand between them; and with `reset_position_ids` or `reset_attention_mask` a new document begins at
    its first text token, and pauses behind an EOD still see, and count on from, the document that it ends.
    `cu_seqlens` counts each pause to the document of the token that it stands behind; its documents are the corpus's,
    as in GPTDataset, whether or not they end in EOD.

    The arguments are GPTDataset's, by position, as the stock builder passes them. Once they have become the
    document_index, `indices` is None.

    Raises:
        DataError: a split without any token, which megatron-core would look at forever; an index cache that cannot be
            written, or that rank 0 should have built; a corpus that contains a pause id (when the sample is read).
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: PauseGPTDatasetConfig,
    ) -> None:
        _check_not_empty(indexed_dataset, dataset_path, indexed_indices, index_split)
        plan = config.pause_plan
        self.injector = PauseInjector(
            plan, config.tokenizer.pause_ids, os.path.basename(dataset_path or ""), index_split.name
        )
        # GPTDataset cuts text windows; it must see their length, not that of the windows with pauses in.
        text_config = copy.copy(config)
        text_config.sequence_length = plan.text_length - 1
        text_config.path_to_cache = config.window_cache_path or config.path_to_cache
        text_config.corpus_content = content_of(dataset_path, indexed_dataset.sequence_lengths)
        self._position_ids = torch.arange(plan.sequence_length)
        self._all_ones = np.ones(plan.sequence_length, dtype=np.float32)
        self._attention_mask: torch.Tensor | None = None
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, text_config)
        if not config.defer_npy_index_mmap:  # with it, __len__ counts their tokens
            # document_index has them too. These are 1.5 GB of C4, in each rank's own memory. megatron-core has None
            # here with fast_cache_load.
            self.indices = None

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: PauseGPTDatasetConfig) -> IndexedDataset:
        """Open a corpus, as GPTDataset does."""
        if dataset_path is None:
            raise ConfigError(
                "blend: expected prefixes of corpora, got none (--mock-data): use megatron-core's MockGPTDataset, "
                "which takes this configuration and has no pauses"
            )
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Only what may change the indices that are cached: what becomes of EOD in a sample does not, here as in
        # GPTDataset, so documents joined and apart share a cache.
        return [
            *GPTDataset._key_config_attributes(),
            "pause_rate",
            "pause_window",
            "pause_placement",
            "pause_seed",
            "corpus_content",
        ]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """The indices, from files that were checked. Rank 0 builds them where they are not there or not whole."""
        config = self.config  # this dataset's own copy
        if config.path_to_cache is None:  # where GPTDataset puts them
            config.path_to_cache = os.path.join(self.dataset.path_prefix, "cache", f"{type(self).__name__}_indices")
        folder = config.path_to_cache
        cache = IndexCache(folder, self.unique_description_hash)
        others_build = config.fast_cache_load or config.defer_npy_index_mmap
        if others_build or (torch.distributed.is_initialized() and torch.distributed.get_rank() != 0):
            cache.require()
        elif not cache.is_whole(read=config.read_index_cache):
            with cache.building() as config.path_to_cache:
                super()._build_document_sample_shuffle_indices()
            config.path_to_cache = folder
        return super()._build_document_sample_shuffle_indices()

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """One sample. `None` gives a filler for an incomplete batch: sample 0 with nothing supervised."""
        sample = super().__getitem__(idx) if self.injector.plan.count == 0 else self._with_pauses(idx)
        if self.config.document_segments:
            sample["segments"] = segments_of(sample["position_ids"])
        return sample

    def window_text(self, sample: int) -> np.ndarray:
        """The text of a window before its pauses: int64 [T]."""
        text, _ = self._text_and_lengths(sample)
        return text

    def _text_and_lengths(self, sample: int) -> tuple[np.ndarray, list[int] | None]:
        # The text ids come first in every release; 0.19 added a third value, the tokens taken from each document.
        text, _, *lengths = self._query_document_sample_shuffle_indices(sample)
        return text, lengths[0] if lengths else None

    def _with_pauses(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = 0 if idx is None else int(idx)
        text, lengths = self._text_and_lengths(sample)
        self._refuse_pause_ids(text, sample)
        window = self.injector(text, sample % len(self))
        item = self._sample(text, window, supervised=idx is not None)
        if getattr(self.config, "inter_document_masking", False):  # 0.19 has it
            item.pop("attention_mask", None)
            item |= packed_documents(window, lengths)
        return item

    def _sample(self, text: np.ndarray, window: Window, supervised: bool) -> dict[str, torch.Tensor]:
        """GPTDataset's dictionary for a window of N + 1 tokens with pauses in."""
        config, tokens = self.config, window.tokens
        before_pause = window.places - 1
        labels = tokens[1:].copy()
        labels[before_pause] = 0
        loss_mask = self._all_ones.copy()
        loss_mask[before_pause] = 0
        begins = None
        if config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask:
            begins = document_begins(window, config.tokenizer.eod)
        if config.eod_mask_loss:
            loss_mask[begins[1:]] = 0
        # A text that is too short is padded at its end; only a tokenizer's own padding id can stand elsewhere.
        if self._pad_token_id != NO_PAD or text[-1] == NO_PAD:
            loss_mask[labels == self._pad_token_id] = 0
            labels[labels == self._pad_token_id] = 0
            tokens[tokens == self._pad_token_id] = 0  # the embedding must be able to look it up
        if not supervised:
            loss_mask[:] = 0
        sample = {"tokens": torch.from_numpy(tokens[:-1]), "labels": torch.from_numpy(labels)}
        if config.create_attention_mask:
            sample["attention_mask"] = self._hidden(begins)
        sample["loss_mask"] = torch.from_numpy(loss_mask)
        sample["position_ids"] = self._positions(begins)
        return sample

    def _positions(self, begins: np.ndarray | None) -> torch.Tensor:
        """Position ids int64 [N]. Shared between samples, as GPTDataset's are, unless documents start again at 0."""
        return restarting_positions(begins[:-1]) if self.config.reset_position_ids else self._position_ids

    def _hidden(self, begins: np.ndarray | None) -> torch.Tensor:
        """Attention mask bool [1, N, N], True where a later token, or another document's, is hidden."""
        if self._attention_mask is None:
            length = self.injector.plan.sequence_length
            self._attention_mask = torch.ones(1, length, length, dtype=torch.bool).triu(1)
        if not self.config.reset_attention_mask:
            return self._attention_mask
        document = torch.from_numpy(begins[:-1].cumsum())
        return self._attention_mask | (document[:, None] != document[None, :])

    def _refuse_pause_ids(self, text: np.ndarray, sample: int) -> None:
        """A corpus holds no pause ids: one there would be taken for an injected pause and never be learned."""
        pause_ids = self.injector.pause_ids
        if text.max() < pause_ids.start:  # nearly always: they follow the vocabulary
            return
        found = (text >= pause_ids.start) & (text < pause_ids.stop)
        if found.any():
            raise DataError(
                f"{self.dataset_path}.bin: expected text only, found the pause id {text[found][0]} in the text of "
                f"sample {sample} ({self.index_split.name}). Prepare the corpus again, or choose another pause id"
            )


def _check_not_empty(
    indexed_dataset: IndexedDataset, dataset_path: str | None, indexed_indices: np.ndarray | None, split: Split
) -> None:
    if indexed_indices is None:
        return
    # Nearly always the first piece has text. All lengths of C4 are 1.5 GB, which every rank would read and copy.
    pieces = (indexed_indices[start : start + _PIECE] for start in range(0, len(indexed_indices), _PIECE))
    if not any(indexed_dataset.sequence_lengths[piece].any() for piece in pieces):
        raise DataError(
            f"{dataset_path}: expected text in the {split.name} split, found no token in its {len(indexed_indices)} "
            f"documents. Give the split a larger share, or leave it out"
        )
