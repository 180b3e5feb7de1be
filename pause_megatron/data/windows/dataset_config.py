"""The configuration of megatron-core's GPT dataset with pauses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from pause_megatron.data.windows.index_cache import Content
from pause_megatron.data.windows.model_rows import check_model_rows
from pause_megatron.data.windows.pause import PausePlan
from pause_megatron.errors import ConfigError


@dataclass
class PauseGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig plus pauses. `sequence_length` includes the pauses. `tokenizer` must be a PauseTokenizer.

    Raises:
        ConfigError: As PausePlan; a tokenizer without `pause_ids`; or a model without an embedding row for each pause.
    """

    pause_rate: float = 0.1
    """Pauses inserted, as a fraction of sequence_length. 0: no pauses, and the samples of GPTDataset bit for bit."""

    pause_window: str = "exact"
    """exact: fewer text tokens are drawn, and none is lost. trim: the paper's window, cut after insertion."""

    pause_placement: str = "uniform"
    """A name in `config.pauses.PLACEMENTS`, or 'module:attribute' of a PlacementPolicy or a WindowPolicy."""

    pause_seed: int = 1234
    """Seed of the placement, independent of random_seed."""

    pause_positions: str = "own"
    """own: a pause uses up a position, as any token. shared: it has the position_ids of the text token before it. Then
       the model must read position_ids, as PauseGPTModel with `given_positions`; rotary embedding in megatron-core's
       GPTModel does not."""

    pause_run: int = 1
    """Consecutive pauses at each place that the policy chooses."""

    pause_pattern: str | None = None
    """Regular expression of the placements after and before. None: punctuation."""

    side: str | None = None
    """Name of a side array of each corpus (PREFIX.NAME.npy with its record in PREFIX.manifest.json), for the placement
       scored or a WindowPolicy of yours, and for side_weights."""

    side_weights: bool = False
    """Add weights float32 [N] to a sample: the side value of the label at each position, 0 where there is no target."""

    model_vocab_size: int | None = None
    """Rows of the model's embedding, padding included (Megatron-LM's args.padded_vocab_size). Too few are an error.
       None: those of the Megatron-LM in this process; without one, a warning says that they are not checked."""

    document_segments: bool = False
    """Add segments int32 [N] to a sample: its documents, numbered from 0. A model with variable-length attention, or
       with a mask of its own, takes them in place of an attention_mask [1, N, N]. With reset_position_ids only."""

    window_cache_path: str | None = None
    """Folder of the window indices. None: path_to_cache. BlendedDataset needs a process group to use path_to_cache;
       windows can be cached here without one."""

    read_index_cache: bool = False
    """Compare cached indices with their digests at each start, even if they are unchanged since."""

    token_dtype_code: int | None = field(init=False, default=None)
    """megatron-core's code of the ids' type in the .bin, derived from the text vocabulary."""

    corpus_content: Content | None = field(init=False, default=None)
    """Digests of the corpus, part of the key of its index cache. Each dataset sets it in its own copy."""

    pause_plan: PausePlan = field(init=False)
    """The pause settings with the numbers that follow from them. Derived from the other fields."""

    def __post_init__(self) -> None:
        """Check the pause settings, after megatron-core has checked its own."""
        super().__post_init__()
        if not isinstance(getattr(self.tokenizer, "pause_ids", None), range):
            raise ConfigError(
                f"tokenizer: expected a PauseTokenizer, which has the pause ids, got a {type(self.tokenizer).__name__}"
            )
        if not self.add_extra_token_to_sequence:
            raise ConfigError(
                "add_extra_token_to_sequence: expected True, because the last target of a window is its extra token, "
                "got False"
            )
        if self.pause_positions not in ("own", "shared"):
            raise ConfigError(f"pause_positions: expected 'own' or 'shared', got {self.pause_positions!r}")
        if self.side is None and (self.side_weights or (self.pause_placement == "scored" and self.pause_rate)):
            key = "side_weights" if self.side_weights else "pause_placement=scored"
            raise ConfigError(f"side: expected the name of a side array with {key}, got None")
        used = self.side_weights or self.pause_placement == "scored" or ":" in self.pause_placement
        if self.side is not None and not used:
            raise ConfigError(
                "side: expected pause_placement=scored, a policy of yours or side_weights=True with it, got "
                f"pause_placement={self.pause_placement}"
            )
        if self.document_segments and not self.reset_position_ids:
            raise ConfigError("document_segments: expected reset_position_ids=True with it, got False")
        if self.token_dtype_code is not None:
            # The .bin holds text ids only, so that the pause ids must not change its type.
            self.token_dtype_code = 4 if self.tokenizer.text_size > np.iinfo(np.uint16).max + 1 else 8
        self.pause_plan = PausePlan(
            self.sequence_length,
            self.pause_rate,
            self.pause_window,
            self.pause_placement,
            self.pause_seed,
            self.pause_run,
            self.pause_pattern,
        )
        if self.pause_plan.count:
            check_model_rows(self.tokenizer.pause_ids, self.model_vocab_size)
