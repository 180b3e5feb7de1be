"""Readers that turn shards on disk or Hugging Face data sets into documents, and count every malformed line."""
