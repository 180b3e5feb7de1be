"""GPT checkpoints of Megatron-LM: import (torch_dist and mp_rank folders) and export."""
