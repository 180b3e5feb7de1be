"""Do pauses help a small model? A declared experiment: one setting against a standard set of controls.

python -m tests.benchmarks.pauses_matter codewords --output FOLDER [--stages tuning,final,report] [--jobs 2]

`codewords` is the declaration beside this file; a path of another one does as well. Each setting is trained with each
learning rate and tuning seed, then with the best rate and each final seed, through this project's finetuning (data
path, DeepSpeed engine, loss; from initial weights). The exported models answer. FOLDER/codewords.jsonl gets a line for
each run; the same command resumes. FOLDER/codewords.md and FOLDER/codewords.png say what survives.

A declaration in a repository must be committed as it is before its final runs; the results of another one are refused.
"""
