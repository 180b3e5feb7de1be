"""A corpus to windows with pauses: placement policies, injection, and megatron-core's GPT dataset."""
