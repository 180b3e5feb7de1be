"""A pretrain_gpt.py for each generation of Megatron-LM's interfaces, as far as data and model go.

Ours, written after the releases: which names the script imports, where its tokenizer comes from, the entries of
`data_args`, the signatures of its providers and of `pretrain`, and when the vocabulary's size is read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

GENERATIONS = ("0.16", "0.17", "0.18", "0.19")

_IMPORTS = """
import json
from functools import partial

import torch
from gpt_builders import gpt_builder
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from {build_tokenizer} import build_tokenizer
from megatron.training import {names}, pretrain, print_rank_0
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split
from model_provider import model_provider
"""

_STEP = '''

def get_batch(data_iterator):
    """One tensor-parallel rank reads, the others are sent what it read."""
    names = ["tokens", "labels", "loss_mask", "attention_mask", "position_ids"]
    batch = [next(data_iterator)] if parallel_state.get_tensor_model_parallel_rank() == 0 else [None]
    torch.distributed.broadcast_object_list(
        batch, parallel_state.get_tensor_model_parallel_src_rank(), parallel_state.get_tensor_model_parallel_group()
    )
    return [batch[0].get(name) for name in names]


def loss_func(loss_mask, output_tensor):
    losses = output_tensor.view(-1).float() * loss_mask.view(-1)
    return losses.sum(), loss_mask.sum()


def forward_step(data_iterator, model):
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    output_tensor = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output_tensor, partial(loss_func, loss_mask)


def is_dataset_built_on_rank(vp_stage=None{packed}):
    return parallel_state.get_tensor_model_parallel_rank() == 0
'''

_DATA = """

def core_gpt_dataset_config_from_args(args):
{tokenizer}

    blend, blend_per_split = get_blend_and_blend_per_split(args)

    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, "r") as f:
            sequences_per_dataset = json.load(f)

    data_args = {{
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": tokenizer,
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "hybrid_context_parallel": args.hybrid_context_parallel,{more_data_args}
    }}

    if args.fim_data:
        data_args.update({{"fim_rate": args.fim_rate}})
        return GPTFIMDatasetConfig(**data_args)

    return GPTDatasetConfig(**data_args)


def train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None):
    args = get_args()

    config = core_gpt_dataset_config_from_args(args)

    if args.sft:
        dataset_type = SFTDataset
    else:
        if args.mock_data:
            dataset_type = MockGPTDataset
        elif args.fim_data:
            dataset_type = GPTFIMDataset
        else:
            dataset_type = GPTDataset

    print_rank_0("> building train, validation, and test datasets for GPT ...")

    train_ds, valid_ds, test_ds = BlendedMegatronDatasetBuilder(
        dataset_type, train_val_test_num_samples, partial(is_dataset_built_on_rank, vp_stage=vp_stage), config
    ).build()

    return train_ds, valid_ds, test_ds


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    pretrain, store = pretrain, None  # 0.16 on: inprocess_restart wraps it
"""

_LEGACY = """    if args.legacy_tokenizer:
        tokenizer = get_tokenizer()
    else:
        tokenizer = build_tokenizer(args)"""

_MAIN = {
    # 0.16 and 0.17: the arguments are parsed and the tokenizer is built inside pretrain.
    "0.16": """
    pretrain(
        train_valid_test_datasets_provider,
        partial(model_provider, gpt_builder),
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        store=store,
    )
""",
    "0.18": """
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    full_config = pretrain_cfg_container_from_args(args)
    pretrain(
        full_config,
        train_valid_test_datasets_provider,
        partial(model_provider, gpt_builder),
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
    )
""",
    "0.19": """
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model_cfg = gpt_config_from_args(args)
    full_config = pretrain_cfg_container_from_args(args, model_cfg)
    pretrain(
        full_config,
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
    )
""",
}

_PARSE = "from megatron.training.arguments import parse_and_validate_args\n"
_CONFIG = "from megatron.training.argument_utils import {}pretrain_cfg_container_from_args\n"

GPT_BUILDERS = """
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import print_rank_0
from megatron.training.arguments import core_transformer_config_from_args


def gpt_builder(args, pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
    print_rank_0("building GPT model ...")
    if config is None:
        config = core_transformer_config_from_args(args)
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=None,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
"""

MODEL_PROVIDER = """
from megatron.training import get_args


def model_provider(
    model_builder, pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    args = get_args()
    return model_builder(args, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection)
"""


def write_scripts(folder: Path, generation: str) -> None:
    """Write pretrain_gpt.py, gpt_builders.py and model_provider.py of a generation.

    Releases bring their own megatron-core. Here it is the installed one, so an option that it lacks is left out.
    """
    fields = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
    is_old = generation == "0.16"
    imports = _IMPORTS.format(
        build_tokenizer=f"megatron.core.tokenizers.{'text.' if is_old else ''}utils.build_tokenizer",
        names="get_args, get_tokenizer" if is_old else "get_args",
    )
    if generation in ("0.18", "0.19"):
        imports += _PARSE + _CONFIG.format("gpt_config_from_args, " if generation == "0.19" else "")
    data = _DATA.format(
        tokenizer=_LEGACY if is_old else "    tokenizer = build_tokenizer(args)",
        more_data_args='\n        "inter_document_masking": args.dataloader_inter_document_masking,'
        if generation == "0.19" and "inter_document_masking" in fields
        else "",
    )
    step = _STEP.format(packed=", is_packed_sequence=False" if generation == "0.19" else "")
    main = _MAIN["0.16" if generation == "0.17" else generation]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("pretrain_gpt.py", imports + step + data + main),
        ("gpt_builders.py", GPT_BUILDERS),
        ("model_provider.py", MODEL_PROVIDER),
    ):
        (folder / name).write_text(text.lstrip("\n"), encoding="utf-8")
