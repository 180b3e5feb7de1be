"""A model without an embedding row for each pause id is an error, with every source of the number of rows."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from types import ModuleType

import pytest
from support.corpora import ByteTokenizer, make_config

from pause_megatron.errors import ConfigError

PAUSE = ByteTokenizer.pause_id


@pytest.mark.parametrize(("embeddings", "enough"), [(1, PAUSE + 1), (3, PAUSE + 3)])
def test_the_rows_that_are_given(embeddings: int, enough: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*model_vocab_size")
        make_config("corpus", 64, embeddings, model_vocab_size=enough)
        make_config("corpus", 64, embeddings, model_vocab_size=1, pause_rate=0.0)  # nothing is put in
        with pytest.raises(ConfigError, match=rf"expected {enough} or more.*got {enough - 1}.*--padded-vocab-size N"):
            make_config("corpus", 64, embeddings, model_vocab_size=enough - 1)


def test_an_unknown_number_of_rows_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=rf"model_vocab_size is not given.*has {PAUSE + 1} rows") as found:
        make_config("corpus", 64, model_vocab_size=None)
    assert [warning.filename for warning in found if "model_vocab_size" in str(warning.message)] == [
        sys.modules["support.corpora"].__file__
    ]


def test_the_rows_of_the_megatron_lm_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`megatron.training.global_vars.get_args` returns the arguments, or raises AssertionError before parsing."""
    variables = ModuleType("megatron.training.global_vars")
    monkeypatch.setitem(sys.modules, variables.__name__, variables)
    variables.get_args = lambda: Namespace(padded_vocab_size=256)
    with pytest.raises(ConfigError, match=f"expected {PAUSE + 1} or more.*got 256"):
        make_config("corpus", 64, model_vocab_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*model_vocab_size")
        make_config("corpus", 64, model_vocab_size=PAUSE + 1)  # what is given counts
        variables.get_args = lambda: Namespace(padded_vocab_size=384)
        make_config("corpus", 64, model_vocab_size=None)

    def not_yet() -> Namespace:
        raise AssertionError("args is not initialized.")

    variables.get_args = not_yet
    with pytest.warns(UserWarning, match="model_vocab_size is not given"):
        make_config("corpus", 64, model_vocab_size=None)
