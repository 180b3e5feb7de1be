"""Bytes to documents: shards on disk or the Hugging Face Hub, with every malformed line counted."""
