"""A corpus to windows with pauses: placement, injection, and megatron-core's GPT dataset."""
