"""Synthetic tasks, whose examples are generated: noisy codewords, counting, parity, and sets that meet."""
