"""What a run is: frozen, typed sections, one per owner. No torch in here, so that --help and a wrong key are instant.

Every field says its unit and range. Values that depend on other values (a preset's sizes, the number of steps in a
token budget) are filled in by `pause_megatron.config.load`, once; nothing is changed afterwards.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from pause_megatron.config.blend import split_words
from pause_megatron.files.paths import expanded, expanded_pattern

PathText = Annotated[str, AfterValidator(expanded)]
"""The type of every key that takes a path, or a name in a path's place."""

PatternText = Annotated[str, AfterValidator(expanded_pattern)]
"""The type of keys that take paths or globs."""


class Section(BaseModel):
    """A frozen group of keys. Unknown keys and values of another type are refused ("4" is not 4, true is not 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    dir: PathText = Field(
        "runs/default", description="run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/"
    )
    seed: int = Field(1234, ge=0, description="seed of the initial weights and of the sample order")
    hang_seconds: int = Field(
        1800,
        ge=0,
        description="a rank that gets no further for so long prints its stacks and ends the run; more than the longest "
        "step, validation or save; 0: never",
    )
    connect_seconds: int = Field(
        600, ge=1, description="a rank that does not find the others for so long at the start says whom, and ends"
    )
    start_over: bool = Field(
        False,
        description="begin at step 1 where the checkpoints of a run are gone (else refused); its metrics.jsonl and "
        "tensorboard/ are kept beside as metrics.before-TIME.jsonl and tensorboard.before-TIME. Where a complete "
        "checkpoint is there the run goes on from it all the same",
    )


class DataSection(Section):
    """The prepared corpus and how windows are cut from it."""

    prefix: tuple[PathText, ...] = Field(
        (),
        description="prefix of a prepared corpus (PREFIX.bin, PREFIX.idx, PREFIX.manifest.json); or several; "
        "or a blend 'WEIGHT PREFIX WEIGHT PREFIX ...' as in Megatron-LM's --data-path",
    )
    source: tuple[PatternText, ...] = Field(
        (),
        description="instead of data.prefix: shards (paths or globs) or hf:NAME, read and tokenized while training; "
        "hf:json may be followed by files",
    )
    source_config: str | None = Field(None, description="configuration of data.source=hf:NAME, for example en")
    source_split: str = Field("train", description="split of data.source=hf:NAME")
    text_key: str = Field("text", description="key of the text in data.source")
    sequence_length: int = Field(2048, ge=8, description="tokens of a window, pauses included")
    valid_prefix: tuple[PathText, ...] = Field(
        (),
        description="prefix (or several, or a blend) of corpora to validate on; then all of data.prefix trains",
    )
    split: str | None = Field(
        None,
        description="shares of the documents for train, validation, test; default: 99,1,0, or with data.valid_prefix "
        "1,0,0",
    )
    tokenizer: PathText | None = Field(
        None,
        description="tokenizer to insist on (another one is refused); default: the one kept beside the corpus, or for "
        "a finetuning that of model.from",
    )
    cache: PathText | None = Field(
        None,
        description="folder of index caches, which all hosts see; default: 'cache' beside the first prefix, or in the "
        "run folder where nobody can write there",
    )
    verify: Literal["once", "always", "never"] = Field(
        "once",
        description="once: read each corpus whole at its first use and compare it with its digests; always: at every "
        "start; never: check sizes and headers only",
    )
    intra_document_masking: bool = Field(
        False,
        description="attention of a token to its own document only, whose positions start at 0, as Megatron-LM's "
        "--reset-attention-mask and --reset-position-ids; false: to all tokens of the window before it",
    )
    eod_mask_loss: bool = Field(
        False, description="no loss on the first token of a document, which is predicted from the end of another one"
    )
    prefetch: int = Field(2, ge=0, description="steps whose batches are read ahead by a thread; 0 reads in the loop")

    @field_validator("prefix", "valid_prefix", "source", mode="before")
    @classmethod
    def _split_prefix(cls, value: object) -> object:
        return split_words(value)


class ModelSection(Section):
    """A Llama-like decoder. Sizes left out come from the preset."""

    # "from" is a word of Python's: the attribute is `from_`, the key that people write is model.from.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    from_: PathText | None = Field(
        None,
        alias="from",
        description="checkpoint to take initial weights from (a run, a checkpoint, or what import-hf made); sizes left "
        "out come from it. Optimizer, step and data begin anew",
    )
    preset: Literal["tiny", "130m", "1b", "7b"] | None = Field(
        "tiny", description="sizes to start from; null: give layers, hidden, heads"
    )
    layers: int | None = Field(None, ge=1, description="transformer layers")
    hidden: int | None = Field(None, ge=8, description="width of the residual stream")
    heads: int | None = Field(None, ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (GQA); default: heads, plain attention")
    ffn: int | None = Field(
        None, ge=8, description="width of the SwiGLU feed-forward layer; default: 8/3 hidden, upwards to 64s"
    )
    tied: bool | None = Field(None, description="one matrix for input embedding and output layer")
    qkv_bias: bool = Field(False, description="biases on queries, keys and values, as in Qwen2")
    rope_base: float = Field(10000.0, gt=0, description="base of the rotary position embedding")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")
    attention: Literal["sdpa", "te"] = Field(
        "sdpa",
        description="attention core: torch's scaled_dot_product_attention, or Transformer Engine where installed",
    )
    vocab_multiple: int = Field(
        128, ge=1, description="the vocabulary is padded to a multiple of this x parallel.tensor"
    )
    head_chunk: int | None = Field(
        None,
        ge=1,
        description="rows of logits that exist at one time in the LM head; null: a multiple of 1024 that takes at most "
        "256 MiB on a GPU, 32 MiB on a CPU, but at least 1024",
    )


class PauseSection(Section):
    """Where pauses go and how they count (method: Goyal et al., ICLR 2024, section 3)."""

    rate: float = Field(0.1, ge=0, lt=1, description="pauses inserted, as a fraction of data.sequence_length; 0: none")
    window: Literal["exact", "trim"] = Field(
        "exact", description="exact: fewer text tokens are drawn, none is lost; trim: the paper's, cut after insertion"
    )
    placement: str = Field(
        "uniform",
        description="uniform, isolated, with_replacement, bernoulli, interval, or 'module:attribute' of a policy",
    )
    seed: int = Field(1234, ge=0, description="seed of the places, independent of run.seed")
    embeddings: int = Field(
        1, ge=1, description="number of distinct pause vectors, used in turn within a run of pauses"
    )
    softmax: Literal["keep", "exclude"] = Field(
        "keep", description="whether the pause logits stay in the softmax denominator"
    )


class TaskSection(Section):
    """What a model is finetuned on. A run with a task is a finetuning."""

    name: PathText | None = Field(
        None, description="a task that ships, a task's YAML file, or 'module:attribute'; null: pretraining on a corpus"
    )
    path: PathText | None = Field(
        None, description="folder with this task's train.jsonl[.gz] and evaluation file; default: the Hugging Face Hub"
    )
    limit: int | None = Field(None, ge=1, description="train on the first so many records; default: all")


class FinetuneSection(Section):
    """Pauses behind prompts, and loss on targets alone (method: Goyal et al., ICLR 2024, section 3.2)."""

    pauses: str = Field(
        "0",
        description="pauses of an example, M_ft; or a range LOW..HIGH that is drawn from for each example and epoch",
    )
    location: Literal["append", "prepend"] = Field("append", description="pauses behind or before the prompt")
    prefix_attention: Literal["causal", "bidirectional"] = Field(
        "causal", description="bidirectional: prompt and pauses see each other in both directions, as in the paper"
    )
    filler: str | None = Field(None, description="text of an ordinary token to use in place of <pause>, a control")
    batching: Literal["packed", "padded"] = Field(
        "packed", description="packed: several examples share a window and do not see each other; padded: one a window"
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the examples; give this, train.steps or train.tokens"
    )


class TrainSection(Section):
    """How long."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; give this or train.tokens")
    tokens: int | None = Field(None, ge=1, description="raw tokens (text and pauses); give this or train.steps")
    extended_from: int | None = Field(
        None,
        ge=1,
        description="the step at which a finished run ended, to go on from there to a larger train.steps with its "
        "optimizer state; optim.lr, min_lr_fraction, warmup_steps, schedule and decay_fraction may change at that "
        "step. constant: stays at optim.lr; other schedules begin anew over the added steps, warm-up too. A corpus's "
        "windows that were not read follow, or where they do not last it is read anew in an order of its own",
    )
    only: Literal["pause_rows"] | None = Field(
        None, description="pause_rows: update the pause embeddings (and pause logits) alone, all else stays; null: all"
    )


class BatchSection(Section):
    """How many windows go into a step and into one pass."""

    global_size: int = Field(32, ge=1, description="windows per optimizer step, over all ranks")
    micro_size: int = Field(4, ge=1, description="windows per forward and backward pass on one rank")


class OptimSection(Section):
    """AdamW and its schedule. No weight decay on norms, biases and pause rows."""

    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    min_lr_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a fraction of the peak")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up: cosine decay; warm-up, stable, linear decay; constant"
    )
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of train.steps spent on the final decay")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment decay")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second moment decay")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")


class ParallelSection(Section):
    """How one model spreads over ranks. What is left of the world is data parallel."""

    tensor: int = Field(1, ge=1, description="tensor-parallel ranks")
    sequence: bool = Field(False, description="split norms and residuals over the tensor-parallel ranks too")
    recompute: Literal["none", "full"] = Field("none", description="full: recompute each layer in the backward pass")


class EngineSection(Section):
    """DeepSpeed."""

    ds_config: PathText | None = Field(None, description="DeepSpeed JSON: a path, or a name in ds_configs/ ('zero2')")
    zero_stage: int | None = Field(None, ge=0, le=3, description="ZeRO stage; default: the ds_config's, else 1")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of the model; optimizer state is fp32")
    kernels: Literal["auto", "plain", "compiled", "triton"] = Field(
        "auto",
        description="of rotary embedding, SwiGLU and cross-entropy: plain: torch, op by op; compiled: torch.compile of "
        "these; triton: one kernel each; auto: triton on a CUDA device, else plain",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU: only algorithms that give the same bits again (a slower backward pass of attention, a "
        "fixed workspace of cuBLAS); a CPU always does",
    )


class CheckpointSection(Section):
    """Complete-or-invisible saves under RUN/checkpoints/."""

    every: int = Field(1000, ge=0, description="steps between saves; 0: only at the end and on a stop signal")
    keep: int = Field(
        3, ge=1, description="complete checkpoints that are kept; the newest and the one before it always are"
    )
    before_end_seconds: int = Field(
        300,
        ge=0,
        description="seconds before a SLURM job's time limit at which the run saves and stops; more than a step and a "
        "save take; 0: only on a signal",
    )


class ValidationSection(Section):
    """Held-out loss: with pauses, without pauses, directly after a pause, elsewhere."""

    every: int = Field(1000, ge=0, description="steps between validations; 0: never")
    samples: int = Field(128, ge=1, description="windows of the validation split that are scored")


class LogSection(Section):
    """What a run says while it goes on."""

    every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl and TensorBoard points")
    tensorboard: bool = Field(True, description="write RUN/tensorboard/")
    samples_every: int = Field(500, ge=0, description="steps between texts of a batch with its pauses shown; 0: never")
    peak_tflops: float | None = Field(
        None, gt=0, description="peak of one device in TFLOP/s, for MFU; default: known GPUs, else no MFU"
    )


class RunConfig(Section):
    """The keys of a run as they were written; what was left out and follows from others is None.

    `pause_megatron.config.load` makes a `ResolvedConfig` of it, which everything else takes.
    """

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    pause: PauseSection = PauseSection()
    task: TaskSection = TaskSection()
    finetune: FinetuneSection = FinetuneSection()
    train: TrainSection = TrainSection()
    batch: BatchSection = BatchSection()
    optim: OptimSection = OptimSection()
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    log: LogSection = LogSection()


class ResolvedData(DataSection):
    """The data section with its splits known."""

    split: str


class ResolvedModel(ModelSection):
    """The model section with all sizes known."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=8)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn: int = Field(ge=8)
    tied: bool


class ResolvedConfig(RunConfig):
    """Everything that determines a run, as `load` returns it; `dump` writes it, and both are inverse.

    `train.steps` and `train.tokens` are still None where nobody gave them, and in a finetuning whose `finetune.epochs`
    become steps once its examples are counted: see `ScheduledConfig`.
    """

    data: ResolvedData
    model: ResolvedModel


class ScheduledTrain(TrainSection):
    """The train section with the length of the run known."""

    steps: int = Field(ge=1)
    tokens: int = Field(ge=1)


class ScheduledConfig(ResolvedConfig):
    """A resolved configuration whose number of steps is known: one that can be trained."""

    train: ScheduledTrain
