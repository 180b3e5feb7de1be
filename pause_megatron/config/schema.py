"""The keys of a run: frozen, typed sections with defaults, ranges and the descriptions that --help shows.

`pause_megatron.config.load` fills in values that depend on others (a preset's sizes, the steps of a token budget) once.
Nothing is changed afterwards.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pause_megatron.config.blend import split_words
from pause_megatron.config.finetune_schema import FinetuneSection, TaskSection
from pause_megatron.config.model_schema import LoraSection, ModelSection, ResolvedModel
from pause_megatron.config.pauses import OBJECTIVES, PLACEMENTS
from pause_megatron.config.section import PathText, PatternText, Section

Precision = Literal["fp32", "bf16"]


class RunSection(Section):
    """Run folder, seed and time limits."""

    dir: PathText = Field(
        "runs/default", description="run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/"
    )
    seed: int = Field(1234, ge=0, description="seed of the initial weights and of the sample order")
    hang_seconds: int = Field(
        1800,
        ge=0,
        description="seconds without progress after which a rank prints its stacks and ends the run; more than the "
        "longest step, validation or save; 0: no limit",
    )
    connect_seconds: int = Field(
        600, ge=1, description="seconds until the rendezvous fails and names the ranks that are missing"
    )
    start_over: bool = Field(
        False,
        description="allow a start at step 1 in a run folder whose checkpoints are missing; its metrics.jsonl and "
        "tensorboard/ are kept as metrics.before-TIME.jsonl and tensorboard.before-TIME. A run with a complete "
        "checkpoint still resumes",
    )


class DataSection(Section):
    """Corpora, and the windows cut from them."""

    prefix: tuple[PathText, ...] = Field(
        (),
        description="prefix of a prepared corpus (PREFIX.bin, PREFIX.idx, PREFIX.manifest.json), several prefixes, or "
        "a blend 'WEIGHT PREFIX WEIGHT PREFIX ...' as in Megatron-LM's --data-path",
    )
    source: tuple[PatternText, ...] = Field(
        (),
        description="shards (paths or globs) or hf:NAME, streamed and tokenized during training; alternative to "
        "data.prefix; hf:json may be followed by files",
    )
    source_config: str | None = Field(None, description="dataset configuration of data.source=hf:NAME, for example en")
    source_split: str = Field("train", description="split of data.source=hf:NAME")
    text_key: str = Field("text", description="key of the text in data.source")
    sequence_length: int = Field(2048, ge=8, description="tokens of a window, pauses included")
    valid_prefix: tuple[PathText, ...] = Field(
        (),
        description="prefix, prefixes or blend of validation corpora; all documents of data.prefix then train",
    )
    split: str | None = Field(
        None,
        description="relative sizes of the train, validation and test splits in documents; default: 99,1,0, with "
        "data.valid_prefix 1,0,0",
    )
    tokenizer: PathText | None = Field(
        None,
        description="required tokenizer (another one is refused); default: that of the corpus, for finetuning that of "
        "model.from",
    )
    cache: PathText | None = Field(
        None,
        description="folder of index caches on a file system that all hosts share; default: 'cache' beside the first "
        "prefix, or in the run folder if that is read-only",
    )
    verify: Literal["once", "always", "never"] = Field(
        "once",
        description="comparison of each corpus with its digests: once: at its first use; always: at every start; "
        "never: sizes and headers only",
    )
    intra_document_masking: bool = Field(
        False,
        description="attention of a token to its own document only, whose positions start at 0, as Megatron-LM's "
        "--reset-attention-mask and --reset-position-ids; false: to all tokens of the window before it",
    )
    eod_mask_loss: bool = Field(
        False, description="no loss on the first token of a document, as Megatron-LM's --eod-mask-loss"
    )
    side: str | None = Field(
        None,
        description="name of a side array of each corpus (PREFIX.NAME.npy, one value a token, as `score` writes it), "
        "for pause.placement=scored or a policy of yours, and objective.token_weights=side",
    )
    prefetch: int = Field(2, ge=0, description="steps whose batches a thread reads ahead; 0: no thread")

    @field_validator("prefix", "valid_prefix", "source", mode="before")
    @classmethod
    def _split_prefix(cls, value: object) -> object:
        return split_words(value)


class PauseSection(Section):
    """Pauses in a window (Goyal et al., ICLR 2024, section 3)."""

    rate: float = Field(0.1, ge=0, lt=1, description="inserted pauses, as a fraction of data.sequence_length; 0: none")
    window: Literal["exact", "trim"] = Field(
        "exact",
        description="exact: fewer text tokens are drawn, none is lost; trim: the window is cut after insertion, as in "
        "the paper",
    )
    placement: str = Field(
        "uniform",
        description=f"{', '.join(PLACEMENTS)}, or 'module:attribute' of a policy",
    )
    run: int = Field(
        1, ge=1, description="consecutive pauses at each place that the policy chooses; every: after each token"
    )
    pattern: str | None = Field(
        None,
        description="regular expression that the text of a token must contain, for placement after or before it; a "
        "token's text has its leading blank",
    )
    positions: Literal["own", "shared"] = Field(
        "own",
        description="positions of pauses: own: one each, as any token; shared: that of the text token before them, so "
        "that pauses use up no positions",
    )
    seed: int = Field(1234, ge=0, description="seed of the pause positions, independent of run.seed")
    embeddings: int = Field(
        1, ge=1, description="number of distinct pause embeddings, used in turn within consecutive pauses"
    )
    softmax: Literal["keep", "exclude"] = Field(
        "keep", description="pause logits in the softmax denominator: kept or excluded"
    )


class ObjectiveSection(Section):
    """The loss that is minimized; objective=NAME is objective.name=NAME."""

    name: str = Field(
        "cross_entropy",
        description=f"{', '.join(OBJECTIVES)}, or 'module:attribute' of an objective. anytime: after every pause of a "
        "run, on the same target; cyb_*: Catch Your Breath (arXiv:2510.13879): the logit of <pause> is the model's "
        "request for another step",
    )
    discount: float = Field(
        1.0,
        gt=0,
        le=1,
        description="anytime: weight of a step, relative to the step before it; cyb_anytime: factor of the accuracy "
        "with each step",
    )
    stop_rate: float = Field(
        0.5, gt=0, lt=1, description="cyb_variational: rate of the geometric prior over the steps, cut at the run's end"
    )
    step_cost: float = Field(0.1, ge=0, description="cyb_budget: cost of a requested step, in nats")
    z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log-normalizer of the softmax, with any objective; 0: none"
    )
    token_weights: str | None = Field(
        None,
        description="weights of the targets in the loss: side: the values of data.side; or 'module:attribute' of a "
        "function of the target ids; null: 1 each",
    )

    @property
    def changed(self) -> dict[str, object]:
        """The keys that differ from their defaults; empty for the mean cross-entropy of the targets."""
        fields = type(self).model_fields
        return {name: value for name, value in self if value != fields[name].default}


class TrainSection(Section):
    """Training duration."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; alternative to train.tokens")
    tokens: int | None = Field(None, ge=1, description="raw tokens, text and pauses; alternative to train.steps")
    extended_from: int | None = Field(
        None,
        ge=1,
        description="step at which a finished run ended, to extend it to a larger train.steps with its optimizer "
        "state; optim.lr and the schedule may change at that step. constant stays at optim.lr, other schedules and "
        "their warm-up restart over the added steps. Unread windows follow, then the corpus repeats in a new order",
    )
    only: Literal["pause_rows", "lora"] | None = Field(
        None,
        description="trainable parameters; pause_rows: the pause embeddings (and pause logits) only; lora: those and "
        "the adapters of section lora; null: all. Others stay bit for bit, and nothing has weight decay",
    )


class BatchSection(Section):
    """Batch sizes in windows."""

    global_size: int = Field(32, ge=1, description="global batch: windows per optimizer step, over all ranks")
    micro_size: int = Field(4, ge=1, description="micro-batch: windows per forward and backward pass of a rank")


class OptimSection(Section):
    """AdamW and its schedule, without weight decay on norms, biases and embeddings."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    min_lr_fraction: float = Field(0.1, ge=0, le=1, description="final learning rate, as a fraction of the peak")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="learning rate after the warm-up: cosine decay; stable, then linear decay (wsd); constant"
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="fraction of train.steps in the final decay of wsd")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, ge=0, description="maximum global gradient norm; 0: no clipping")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(1e-8, gt=0, description="epsilon of Adam")


class ParallelSection(Section):
    """Tensor and sequence parallelism; the rest of the world size is data parallel."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size")
    sequence: bool = Field(
        False, description="sequence parallelism: norms and residuals split over the tensor-parallel ranks"
    )
    recompute: Literal["none", "full"] = Field(
        "none", description="activation recomputation; full: each layer in the backward pass"
    )


class EngineSection(Section):
    """DeepSpeed engine, precision and kernels."""

    ds_config: PathText | None = Field(None, description="DeepSpeed JSON: a path, or a name in ds_configs/ ('zero2')")
    zero_stage: int | None = Field(None, ge=0, le=3, description="ZeRO stage; default: the ds_config's, else 1")
    precision: Precision = Field("bf16", description="precision of the model; optimizer state is fp32")
    kernels: Literal["auto", "plain", "compiled", "triton"] = Field(
        "auto",
        description="kernels of rotary embedding, SwiGLU and cross-entropy; plain: eager torch; compiled: "
        "torch.compile; triton: one kernel each; auto: triton on a CUDA device, else plain",
    )
    deterministic: bool = Field(
        False,
        description="deterministic algorithms on a GPU (a slower attention backward pass, a fixed cuBLAS workspace); "
        "always on for CPUs",
    )


class CheckpointSection(Section):
    """Saves in RUN/checkpoints/, each published when it is complete."""

    every: int = Field(1000, ge=0, description="steps between saves; 0: at the end and on a stop signal only")
    keep: int = Field(3, ge=1, description="newest complete checkpoints to keep; 1 keeps two")
    before_end_seconds: int = Field(
        300,
        ge=0,
        description="seconds before a SLURM job's time limit at which the run saves and stops; more than a step and a "
        "save take; 0: on a signal only",
    )


class ValidationSection(Section):
    """Validation loss: with and without pauses, directly after a pause and elsewhere."""

    every: int = Field(1000, ge=0, description="steps between validations; 0: never")
    samples: int = Field(128, ge=1, description="windows of the validation split per validation")


class LogSection(Section):
    """Metrics and logs."""

    every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl and TensorBoard points")
    tensorboard: bool = Field(True, description="write RUN/tensorboard/")
    samples_every: int = Field(500, ge=0, description="steps between logged sample texts with their pauses; 0: never")
    peak_tflops: float | None = Field(
        None, gt=0, description="peak TFLOP/s of one device, for MFU; default: of known GPUs, else no MFU"
    )


class RunConfig(Section):
    """The keys of a run as they were written; a value that was left out and follows from others is None.

    `pause_megatron.config.load` turns it into a `ResolvedConfig`, which the rest of the package takes.
    """

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    pause: PauseSection = PauseSection()
    objective: ObjectiveSection = ObjectiveSection()
    task: TaskSection = TaskSection()
    finetune: FinetuneSection = FinetuneSection()
    train: TrainSection = TrainSection()
    lora: LoraSection = LoraSection()
    batch: BatchSection = BatchSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    log: LogSection = LogSection()


class ResolvedData(DataSection):
    """The data section with its splits filled in."""

    split: str


class ResolvedConfig(RunConfig):
    """The complete configuration of a run, as `load` returns it and `dump` writes it.

    `train.steps` and `train.tokens` are None where neither was given, and in a finetuning until its examples are
    counted, from which `finetune.epochs` gives the steps: see `ScheduledConfig`.
    """

    data: ResolvedData
    model: ResolvedModel

    @property
    def positions(self) -> int:
        """Positions that an export states: those of the window, or of the imported model if it has more."""
        return max(self.data.sequence_length, self.model.positions or 0)


class ScheduledTrain(TrainSection):
    """The train section with the number of steps filled in."""

    steps: int = Field(ge=1)
    tokens: int = Field(ge=1)


class ScheduledConfig(ResolvedConfig):
    """A resolved configuration whose number of steps is known: one that can be trained."""

    train: ScheduledTrain
