"""Export to and import from Hugging Face: weights, configuration and tokenizer of Llama-family models with pauses.

`export` converts a checkpoint to a folder that transformers, vLLM and others load without this package, and checks that
both compute the same logits. `import_folder` converts a Llama-family folder to a checkpoint with rows for the pauses.
Neither unpickles anything or runs code of a folder.
"""
