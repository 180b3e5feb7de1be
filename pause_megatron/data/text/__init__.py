"""Readers that turn shards on disk or Hugging Face datasets into documents, and count every malformed line."""
