"""Synthetic tasks, whose examples are generated: noisy codewords and counting."""
