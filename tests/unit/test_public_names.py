"""What `from pause_megatron import ...` gives, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pause_megatron


def test_every_public_name_is_there_lazily_and_for_type_checkers():
    tree = ast.parse(Path(pause_megatron.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}
    assert sorted(typed) == sorted(pause_megatron.__all__)
    for name, (module, attribute) in typed.items():
        value = getattr(pause_megatron, name)
        assert (value.__name__, value.__module__) == (attribute, module)
    assert {*pause_megatron.__all__, "__version__"} <= set(dir(pause_megatron))


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match=r"expected one of .*, got 'PauseLos'\. Did you mean 'PauseLoss'\?"):
        _ = pause_megatron.PauseLos
    with pytest.raises(ImportError, match="'pause_window'"):
        exec("from pause_megatron import pause_window")
    assert not hasattr(pause_megatron, "__wrapped__")


def test_inject_imports_no_torch_and_the_package_nothing_at_all():
    code = (
        "import sys; import pause_megatron; assert 'numpy' not in sys.modules and 'pydantic' not in sys.modules;"
        "from pause_megatron import PauseInjector, PausePlan, inject;"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules;"
        "import numpy; window = inject(numpy.arange(4), numpy.array([2]), range(9, 10));"
        "assert window.tokens.tolist() == [0, 1, 9, 2, 3], window;"
        "from pause_megatron import PauseLoss, PauseTransform, pad_batch;"
        "assert 'torch' in sys.modules and 'megatron' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(pause_megatron.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
