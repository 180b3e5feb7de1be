"""To and from Hugging Face: weights, configuration and tokenizer of Llama-like models, with pauses.

`export` writes a checkpoint as a folder that `transformers`, vLLM and others load without this package, and proves that
it computes the same. `import_folder` makes a checkpoint of a Llama-family folder, with rows for the pauses. Nothing is
unpickled on either way, and no code that comes with a folder is run.
"""
