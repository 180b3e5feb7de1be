"""The model-parallel unit (mpu) of DeepSpeed, over megatron-core's parallel_state."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class MPU:
    """megatron-core's process groups under the names that DeepSpeed 0.19 calls.

    `megatron.core.parallel_state` itself lacks `get_model_parallel_rank` and `_world_size`. DeepSpeed silently assumes
    a world of one where a `get_data_parallel_*` is missing, and Ulysses where there is `initialize_sequence_parallel`.
    So the former are all here and the latter is not.
    """

    # Without pipeline parallelism the model-parallel ranks are the tensor-parallel ranks.
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)

    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_src_rank = staticmethod(parallel_state.get_data_parallel_src_rank)

    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Return the global ranks of this rank's data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
