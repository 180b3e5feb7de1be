"""megatron-core's GPT dataset with pauses, for its BlendedMegatronDatasetBuilder. Nothing is patched.

It imports neither DeepSpeed nor this project's model.
"""

from __future__ import annotations

import copy
import os
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from pause_megatron.data.tokenizer.pause_tokenizer import NO_PAD, PauseTokenizer
from pause_megatron.data.windows.boundaries import (
    document_begins,
    packed_documents,
    restarting_positions,
    segments_of,
    shared_positions,
)
from pause_megatron.data.windows.dataset_config import PauseGPTDatasetConfig
from pause_megatron.data.windows.index_cache import IndexCache, content_of
from pause_megatron.data.windows.pause import PauseInjector, Window
from pause_megatron.data.windows.pieces import SideValues, document_offsets, pieces_of
from pause_megatron.data.windows.targets import supervise
from pause_megatron.data.windows.token_texts import token_texts
from pause_megatron.errors import ConfigError, DataError

__all__ = ["PauseGPTDataset", "PauseGPTDatasetConfig", "PauseTokenizer"]

_CHUNK = 1 << 20  # documents whose lengths are read at a time


class Surroundings(NamedTuple):
    """What is known about the text of a window.

    Attributes:
        side: Side values of its tokens [T], nan at padding; None without a side array.
        documents: Offsets at which its documents begin; None: not looked up.
    """

    side: np.ndarray | None
    documents: np.ndarray | None


_UNKNOWN = Surroundings(None, None)


class PauseGPTDataset(GPTDataset):
    """GPTDataset whose windows hold pauses.

    A sample has the keys, shapes and types of GPTDataset: tokens, labels, position_ids int64 [N], loss_mask float32 [N]
    and, with `create_attention_mask`, attention_mask bool [1, N, N] (True: hidden). `inter_document_masking`
    (megatron-core 0.19) adds cu_seqlens int32 [N + 1] and max_seqlen int32 []; `document_segments` adds segments
    int32 [N], and `side_weights` weights float32 [N]. Where the next token is a pause, label and loss mask are 0, as
    GPTDataset does for padding.

    Document boundaries are those of the text, as if there were no pauses. A pause belongs to the document of the text
    token that it follows. So with `eod_mask_loss` the first text token after an EOD is no target, even if pauses
    come between them. With `reset_position_ids` or `reset_attention_mask`, pauses after an EOD continue the document
    that the EOD ends. The documents of `cu_seqlens` are those of the corpus, as in GPTDataset, with or without EOD.

    The arguments are those of GPTDataset, by position, as BlendedMegatronDatasetBuilder passes them. `indices` is None
    once the document_index is built from it.

    Args:
        indexed_dataset: The corpus.
        dataset_path: Its prefix. Its last component is part of the key of the pauses.
        indexed_indices: Numbers of the documents of the split.
        num_samples: Windows that are needed. None: those of one epoch.
        index_split: The split.
        config: The configuration.

    Raises:
        DataError: A split without any token, for which megatron-core would loop forever; an index cache that cannot be
            written, or that rank 0 should have built; a pause id in the corpus (when the sample is read).
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
            plan,
            config.tokenizer.pause_ids,
            os.path.basename(dataset_path or ""),
            index_split.name,
            token_texts(config.tokenizer),
        )
        # GPTDataset cuts the text windows, so it gets the length of their text.
        text_config = copy.copy(config)
        text_config.sequence_length = plan.text_length - 1
        text_config.path_to_cache = config.window_cache_path or config.path_to_cache
        text_config.corpus_content = content_of(dataset_path, indexed_dataset.sequence_lengths)
        self._side: SideValues | None = None
        self._position_ids = torch.arange(plan.sequence_length)
        self._attention_mask: torch.Tensor | None = None
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, text_config)
        if not config.defer_npy_index_mmap:  # with it, __len__ counts their tokens
            # document_index holds them too. For C4 they take 1.5 GB in the memory of each rank. With fast_cache_load,
            # megatron-core sets None here as well.
            self.indices = None
        if config.side is not None and (config.side_weights or self.injector.sees_windows):
            self._side = SideValues(self, dataset_path or "", config.side)

    @staticmethod
    def build_low_level_dataset(dataset_path: str | None, config: PauseGPTDatasetConfig) -> IndexedDataset:
        """Open a corpus, as GPTDataset does.

        Args:
            dataset_path: Prefix of the corpus.
            config: The configuration.

        Raises:
            ConfigError: There is no prefix, because the configuration is one for mock data.
        """
        if dataset_path is None:
            raise ConfigError(
                "blend: expected prefixes of corpora, got none (--mock-data): use megatron-core's MockGPTDataset, "
                "which takes this configuration and has no pauses"
            )
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        # Only what may change the cached indices. As in GPTDataset, the options about EOD do not, so runs with and
        # without intra-document masking share a cache.
        return [
            *GPTDataset._key_config_attributes(),
            "pause_rate",
            "pause_window",
            "pause_placement",
            "pause_seed",
            "corpus_content",
        ]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Load the indices from checked files. Rank 0 first builds them where they are missing or damaged."""
        config = self.config  # this dataset's own copy
        if config.path_to_cache is None:  # the default of GPTDataset
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
        """Return a sample. `None` gives the dummy sample of an incomplete batch: sample 0 with zero loss weight."""
        if self.injector.plan.count:
            return self._with_pauses(idx)
        sample = super().__getitem__(idx)
        if self.config.document_segments:
            sample["segments"] = segments_of(sample["position_ids"])
        if self.config.side_weights:
            number, size = 0 if idx is None else int(idx), self.injector.plan.sequence_length + 1
            self._add_weights(sample, self.surroundings(number, size).side, np.ones(size, dtype=bool), number)
        return sample

    def window_text(self, sample: int) -> np.ndarray:
        """Return the text of a window before pauses are inserted, int64 [T]."""
        return self.text_and_lengths(sample)[0]

    def text_and_lengths(self, sample: int) -> tuple[np.ndarray, list[int]]:
        """Return the text of a window, int64 [T], and how many of its tokens each document has.

        Args:
            sample: Sample number, 0 or more.

        Returns:
            The text, and the lengths in order; no lengths before megatron-core 0.19.
        """
        text, _, *lengths = self._query_document_sample_shuffle_indices(sample)
        return text, lengths[0] if lengths else []

    def surroundings(self, sample: int, size: int) -> Surroundings:
        """Return what a policy may ask about the text of a window; its text must have been read before.

        Args:
            sample: Sample number, 0 or more.
            size: T, tokens of its text.
        """
        pieces = pieces_of(self, sample)
        return Surroundings(None if self._side is None else self._side.of(pieces, size), document_offsets(pieces))

    def window(self, injector: PauseInjector, sample: int) -> Window:
        """Return a window of this dataset with the pauses of another injector, whose plan has as much text.

        Args:
            injector: The pauses.
            sample: Sample number, 0 or more.
        """
        text = self.window_text(sample)
        known = self.surroundings(sample, text.size) if injector.sees_windows else _UNKNOWN
        return injector(text, sample, side=known.side, documents=known.documents)

    def _add_weights(
        self, item: dict[str, torch.Tensor], side: np.ndarray | None, is_text: np.ndarray, sample: int
    ) -> None:
        if self._side is None or side is None:
            raise TypeError("expected side values, got none")
        loss_mask, split = item["loss_mask"].numpy(), self.index_split
        item["weights"] = torch.from_numpy(self._side.weights(side, is_text, loss_mask, sample=sample, split=split))

    def _with_pauses(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = 0 if idx is None else int(idx)
        text, lengths = self.text_and_lengths(sample)
        self._check_no_pause_ids(text, sample)
        looks = self._side is not None or self.injector.sees_windows
        known = self.surroundings(sample, text.size) if looks else _UNKNOWN
        window = self.injector(text, sample % len(self), side=known.side, documents=known.documents)
        item = self._sample(text, window, supervised=idx is not None)
        if self.config.side_weights:
            self._add_weights(item, known.side, window.is_text, sample)
        if getattr(self.config, "inter_document_masking", False):  # from megatron-core 0.19 on
            item.pop("attention_mask", None)
            item |= packed_documents(window, lengths, shared=self.config.pause_positions == "shared")
        return item

    def _sample(self, text: np.ndarray, window: Window, supervised: bool) -> dict[str, torch.Tensor]:
        """Return the sample of GPTDataset for a window of N + 1 tokens with pauses."""
        config, tokens = self.config, window.tokens
        begins = None
        if config.eod_mask_loss or config.reset_position_ids or config.reset_attention_mask:
            begins = document_begins(window, config.tokenizer.eod)
        labels, loss_mask = supervise(window, begins if config.eod_mask_loss else None)
        # A text that is too short is padded at its end. Only a tokenizer's own padding id can be elsewhere.
        if self._pad_token_id != NO_PAD or text[-1] == NO_PAD:
            loss_mask[labels == self._pad_token_id] = 0
            labels[labels == self._pad_token_id] = 0
            tokens[tokens == self._pad_token_id] = 0  # an id that the embedding has
        if not supervised:
            loss_mask[:] = 0
        sample = {"tokens": torch.from_numpy(tokens[:-1]), "labels": torch.from_numpy(labels)}
        if config.create_attention_mask:
            sample["attention_mask"] = self._hidden(begins)
        sample["loss_mask"] = torch.from_numpy(loss_mask)
        resets = begins[:-1] if begins is not None and config.reset_position_ids else None
        # Samples share one tensor, as in GPTDataset, unless positions depend on the sample.
        sample["position_ids"] = self._position_ids if resets is None else restarting_positions(resets)
        if config.document_segments:
            sample["segments"] = segments_of(sample["position_ids"])
        if config.pause_positions == "shared":
            sample["position_ids"] = shared_positions(window.is_text[:-1], resets)
        return sample

    def _hidden(self, begins: np.ndarray | None) -> torch.Tensor:
        """Return the attention mask bool [1, N, N], True at later tokens and, if reset, at those of other documents."""
        if self._attention_mask is None:
            length = self.injector.plan.sequence_length
            self._attention_mask = torch.ones(1, length, length, dtype=torch.bool).triu(1)
        if begins is None or not self.config.reset_attention_mask:
            return self._attention_mask
        document = torch.from_numpy(begins[:-1].cumsum())
        return self._attention_mask | (document[:, None] != document[None, :])

    def _check_no_pause_ids(self, text: np.ndarray, sample: int) -> None:
        """Check that a text holds no pause id: it would be taken for an inserted pause, and never be a target."""
        pause_ids = self.injector.pause_ids
        if text.max() < pause_ids.start:  # nearly always: they follow the vocabulary
            return
        is_pause = (text >= pause_ids.start) & (text < pause_ids.stop)
        if is_pause.any():
            raise DataError(
                f"{self.dataset_path}.bin: expected text only, got the pause id {text[is_pause][0]} in the text of "
                f"sample {sample} ({self.index_split.name}). Prepare the corpus again, or choose another pause id"
            )


def _check_not_empty(
    indexed_dataset: IndexedDataset, dataset_path: str | None, indexed_indices: np.ndarray | None, split: Split
) -> None:
    if indexed_indices is None:
        return
    # Nearly always the first chunk has text. All lengths of C4 are 1.5 GB, which every rank would read and copy.
    chunks = (indexed_indices[start : start + _CHUNK] for start in range(0, len(indexed_indices), _CHUNK))
    if not any(indexed_dataset.sequence_lengths[chunk].any() for chunk in chunks):
        raise DataError(
            f"{dataset_path}: expected text in the {split.name} split, got no token in its {len(indexed_indices)} "
            f"documents. Enlarge the split, or omit it"
        )
