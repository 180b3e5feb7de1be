"""What surrounds a pretrain_gpt.py in a checkout of Megatron-LM, on CPUs: arguments, the order of things, a few steps.

Stands in for `megatron.training`, which wheels of megatron-core bring since 0.17 and which trains on GPUs only. What is
megatron-core's (tokenizers, data sets, builder, model) is the real thing.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import traceback
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from support.megatron_tokenizers import build_tokenizer, tokenizer_arguments

TENSOR_PARALLEL = 2


class LegacySentencePiece:
    """The tokenizer that core_v0.16's `get_tokenizer()` gives: five more tokens, one of which is its EOD."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocab_size = tokenizer.vocab_size + 5
        self.eod = tokenizer.vocab_size + 2


class Checkout:
    """One generation's `megatron.training`, with the command line as attributes.

    Attributes:
        args: after the script has run, its arguments.
        model: this rank's shard.
        datasets: what the provider gave: train, valid, test.
        losses: of the steps.
    """

    def __init__(self, generation: str, **command_line: object) -> None:
        self.generation = generation
        self.command_line = command_line
        self.args: Namespace | None = None
        self.tokenizer: object = None

    def install(self) -> None:
        """Put the modules that the script imports into sys.modules."""
        for name in [name for name in sys.modules if name.startswith("megatron.training")]:
            del sys.modules[name]
        _module("megatron.training", get_args=self.get_args, get_tokenizer=lambda: self.tokenizer, print_rank_0=_quiet)
        sys.modules["megatron.training"].pretrain = {
            "0.18": self._pretrain_018,
            "0.19": self._pretrain_019,
        }.get(self.generation, self._pretrain_016)
        _module("megatron.training.global_vars", get_args=self.get_args)
        _module(
            "megatron.training.arguments",
            parse_and_validate_args=self._parse,
            core_transformer_config_from_args=_transformer_config,
        )
        _module(
            "megatron.training.argument_utils",
            gpt_config_from_args=lambda args: Namespace(vocab_size=args.padded_vocab_size),
            pretrain_cfg_container_from_args=lambda args, model=None: Namespace(model=model),
        )
        _module("megatron.training.utils", get_blend_and_blend_per_split=_blend)
        _module("megatron.training.datasets")
        _module("megatron.training.datasets.fim_dataset", GPTFIMDataset=None, GPTFIMDatasetConfig=None)
        _module("megatron.training.datasets.sft_dataset", SFTDataset=None)
        for package in ("megatron.core.tokenizers.text.utils", "megatron.core.tokenizers.utils"):
            _module(package)  # where one release has build_tokenizer, and where the others have it
            _module(f"{package}.build_tokenizer", build_tokenizer=build_tokenizer)

    def get_args(self) -> Namespace:
        assert self.args is not None, "args is not initialized."
        return self.args

    def _parse(self, args_defaults: dict[str, object]) -> Namespace:
        """Arguments, and the tokenizer, from which the rows of the embedding follow unless they were given."""
        self.args = args = tokenizer_arguments(**{**_DEFAULTS, **args_defaults, **self.command_line})
        # megatron-core 0.17 on sets the rows too, from its tokenizer; what was given stays.
        self.tokenizer = build_tokenizer(Namespace(**vars(args)))
        if self.generation == "0.16":
            self.tokenizer = LegacySentencePiece(self.tokenizer)
        if args.padded_vocab_size is None:
            multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
            args.padded_vocab_size = -(-self.tokenizer.vocab_size // multiple) * multiple
        return args

    def _pretrain_016(
        self, provider: Any, model_provider: Any, model_type: object, forward_step: Any, args_defaults: Any, store: None
    ) -> None:
        self._parse(args_defaults)
        self._train(provider, model_provider, forward_step)

    def _pretrain_018(
        self, config: Namespace, provider: Any, model_provider: Any, model_type: object, forward_step: Any, store: None
    ) -> None:
        self._train(provider, model_provider, forward_step)

    def _pretrain_019(
        self,
        config: Namespace,
        provider: Any,
        model_type: object,
        forward_step: Any,
        model_provider: Any = None,
        store: None = None,
    ) -> None:
        if config.model is not None:  # the size was read before pretrain was called
            rows = config.model.vocab_size
            builder = sys.modules["gpt_builders"].gpt_builder

            def model_provider(pre_process: bool, post_process: bool, **options: Any) -> Any:
                arguments = Namespace(**{**vars(self.args), "padded_vocab_size": rows})
                return builder(arguments, pre_process, post_process, **options)

        self._train(provider, model_provider, forward_step)

    def outcome(self) -> dict[str, Any]:
        """What a test wants to know of this rank."""
        embedding = self.model.embedding.word_embeddings
        found = {
            "rows": embedding.num_embeddings,
            "losses": self.losses,
            "rank_rows": [embedding.vocab_start_index, embedding.vocab_end_index],
            "moved": (embedding.weight.detach() - self.first_weight).norm(dim=1).tolist(),
        }
        train = self.datasets[0]
        if train is not None:
            train = getattr(train, "datasets", [train])[0]
            config = train.config
            found |= {
                "class": type(train).__name__,
                "eod": config.tokenizer.eod,
                "pause_ids": [*getattr(config.tokenizer, "pause_ids", [])],
                "options": {name: getattr(config, name) for name in _OPTIONS if hasattr(config, name)},
                "samples": [{name: value.tolist() for name, value in train[i].items()} for i in range(12)],
            }
        return found

    def _train(self, provider: Any, model_provider: Any, forward_step: Any) -> None:
        """The model, then the data sets, then steps, as Megatron-LM's `pretrain` does it."""
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.args.tensor_model_parallel_size)
        torch.manual_seed(5)
        self.model = model_provider(pre_process=True, post_process=True, config=None, pg_collection=None)
        self.first_weight = self.model.embedding.word_embeddings.weight.detach().clone()
        assert provider.is_distributed
        self.datasets = provider([self.args.train_samples, 6, 0])
        train = self.datasets[0]
        batches = None if train is None else iter(torch.utils.data.DataLoader(train, batch_size=2))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.losses = []
        for _ in range(self.args.train_iters):
            output, loss_func = forward_step(batches, self.model)
            total, tokens = loss_func(output)
            optimizer.zero_grad()
            (total / tokens).backward()
            optimizer.step()
            self.losses.append((total / tokens).item())


_DEFAULTS = {
    **{"seed": 1234, "seq_length": 64, "max_position_embeddings": 64, "num_layers": 1, "hidden_size": 32},
    **{"num_attention_heads": 4, "normalization": "LayerNorm", "position_embedding_type": "learned_absolute"},
    **{"rotary_percent": 1.0, "rotary_base": 10000, "use_rope_scaling": False, "fp16_lm_cross_entropy": False},
    **{"untie_embeddings_and_output_weights": False, "train_iters": 6, "train_samples": 40, "split": "8,2,0"},
    **{"tensor_model_parallel_size": TENSOR_PARALLEL, "make_vocab_size_divisible_by": 128, "legacy_tokenizer": False},
    **{"per_dataset_sequences_path": None, "multiple_validation_sets": False, "full_validation": False},
    **{"num_dataset_builder_threads": 1, "mmap_bin_files": True, "object_storage_cache_path": None},
    **{"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False, "sft": False},
    **{"create_attention_mask_in_dataloader": True, "mid_level_dataset_surplus": 0.005, "mock_data": False},
    **{"allow_ambiguous_pad_tokens": False, "dataloader_fast_cache_load": False, "fim_data": False},
    **{"dataloader_defer_npy_index_mmap": False, "context_parallel_size": 1, "data_parallel_size": 1},
    **{"sequence_parallel": False, "hybrid_context_parallel": False, "dataloader_inter_document_masking": False},
}


_OPTIONS = (
    *("random_seed", "blend", "split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("path_to_cache", "mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("create_attention_mask", "object_storage_cache_path", "mid_level_dataset_surplus", "fast_cache_load"),
    *("allow_ambiguous_pad_tokens", "sequences_per_dataset", "defer_npy_index_mmap", "context_parallel_size"),
    *("data_parallel_size", "sequence_parallel_size", "hybrid_context_parallel", "inter_document_masking"),
    *("token_dtype_code", "mock"),
)


def _transformer_config(args: Namespace) -> TransformerConfig:
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        normalization=args.normalization,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _module(name: str, **content: object) -> None:
    module = sys.modules.get(name)
    if module is None:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
    vars(module).update(content)


def _blend(args: Namespace) -> tuple[Any, None]:
    return args.data_path and (args.data_path, None), None


def _quiet(*_: object) -> None:
    return None


def run_cases(folder: Path, rank: int) -> None:
    """Run the scripts of `folder`, one after the other, on one of two ranks, and write what came of them."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    # All that megatron-core wants of CUDA here: a device, and a random state for dropout, which is off.
    torch.cuda.current_device = lambda: torch.device("cpu")
    tensor_parallel.get_cuda_rng_tracker = lambda: Namespace(fork=contextlib.nullcontext)
    outcomes = {}
    for name, (generation, command_line) in json.loads((folder / "cases.json").read_text()).items():
        scripts = str(folder / name.replace(" ", "-"))
        for module in _SCRIPTS:
            sys.modules.pop(module, None)
        checkout = Checkout(generation, **command_line)
        checkout.install()
        sys.path.insert(0, scripts)
        try:
            runpy.run_path(f"{scripts}/pretrain_gpt.py", run_name="__main__")
            outcomes[name] = checkout.outcome()
        except Exception as error:
            outcomes[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        finally:
            sys.path.remove(scripts)
            parallel_state.destroy_model_parallel()
    outcomes["modules"] = sorted(sys.modules)
    real = folder / "real.json"
    if real.is_file():
        outcomes["real"] = run_released(folder / "real", json.loads(real.read_text()))
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))


def run_released(scripts: Path, command_line: list[str]) -> dict[str, Any]:
    """The installed release's own `megatron.training`: its arguments, its model, and the script's data sets.

    Its training loop wants GPUs; its arguments allow no tensor parallelism without one.
    """
    for name in [name for name in sys.modules if name.startswith("megatron.training") or name in _SCRIPTS]:
        del sys.modules[name]
    sys.argv = ["pretrain_gpt.py", *command_line]
    sys.path.insert(0, str(scripts))
    os.environ.update(RANK=str(torch.distributed.get_rank()), WORLD_SIZE="2", LOCAL_RANK="0")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    parallel_state.initialize_model_parallel()
    config = gpt_config_from_args(args)
    model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    script = runpy.run_path(str(scripts / "pretrain_gpt.py"), run_name="pretrain_gpt")
    train, _, _ = script["train_valid_test_datasets_provider"]([40, 6, 0])
    found = {
        "rows": model.embedding.word_embeddings.num_embeddings,
        "given": train.config.model_vocab_size,
        "pause_ids": [*train.config.tokenizer.pause_ids],
        "class": type(train).__name__,
        "pauses": (train[0]["tokens"] == train.config.tokenizer.pause_id).sum().item(),
    }
    args.padded_vocab_size = 600
    try:
        script["train_valid_test_datasets_provider"]([40, 6, 0])
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


_SCRIPTS = ("gpt_builders", "model_provider")

if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), int(sys.argv[2]))
