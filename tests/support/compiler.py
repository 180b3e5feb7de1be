"""Tests of `torch.compile` on a CPU, which needs a C++ compiler there."""

from __future__ import annotations

import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile on a CPU needs a C++ compiler"
)
