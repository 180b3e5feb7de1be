"""An objective of a user, whose results are checked: a wrong shape would broadcast or be dropped without a word.

So is what it was given: terms with weights that it changed in place would not be those of the denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pause_megatron.config.user_code import calling
from pause_megatron.errors import ConfigError
from pause_megatron.objective.chunk import Chunk
from pause_megatron.objective.protocol import Objective, Terms

_GIVEN = ("number", "targets", "index", "length", "is_last", "is_pause", "weights", "hidden")


class Checked:
    """An objective, with checks of its names, weights and terms. None of them waits for a device.

    Args:
        objective: The objective.
        name: `objective.name`, for messages.

    Raises:
        ConfigError: Its names are no names, or it has parameters, which would not be trained.
    """

    def __init__(self, objective: Objective, name: str) -> None:
        self._objective, self._name = objective, name
        runs: Any = objective.runs
        if not isinstance(runs, bool):
            raise self._wrong("runs", "True or False", repr(runs))
        self.runs = runs
        names: Any = objective.names
        is_list = isinstance(names, (tuple, list)) and all(isinstance(each, str) for each in names)
        if not is_list or len(set(names)) < len(names):
            raise self._wrong("names", "a tuple of strings, each once", repr(names))
        self.names = tuple(names)
        if isinstance(objective, torch.nn.Module) and any(each.requires_grad for each in objective.parameters()):
            raise self._wrong("parameters", "none that requires a gradient, for no optimizer has them", "some")

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        """Return the weight of each row.

        Args:
            index: As `Objective.weights`.
            length: As `Objective.weights`.
            weight: As `Objective.weights`.

        Raises:
            ConfigError: They are not one finite number >= 0 for each row.
        """
        if not index.numel():
            return weight  # of a micro-batch without targets, which a reduction over rows may not expect
        with calling(f"objective.name={self._name}: weights"):
            found: Any = self._objective.weights(index, length, weight)
        if not isinstance(found, Tensor) or found.shape != index.shape or found.is_complex():
            raise self._wrong("weights", f"a real tensor of shape {tuple(index.shape)}", _described(found))
        wrong = ~((found >= 0) & found.isfinite())
        if wrong.any():
            row = int(wrong.nonzero()[0])
            step = f"step {int(index[row])} of a run of {int(length[row])} rows"
            raise self._wrong("weights", "finite numbers of 0 or more", f"{float(found[row])} for {step}")
        return found.detach().to("cpu", torch.float32, copy=True)  # the objective may change its own later

    def terms(self, chunk: Chunk) -> Terms:
        """Return the terms of a chunk.

        Args:
            chunk: As `Objective.terms`.

        Raises:
            ConfigError: They are no `Terms`, have no gradient, or have other shapes or names; or a tensor of the chunk
                was changed.
        """
        given = [(name, getattr(chunk, name), getattr(chunk, name)._version) for name in _GIVEN]
        terms: Any = self._objective.terms(chunk)
        for name, tensor, version in given:
            if getattr(chunk, name) is not tensor or tensor._version != version:
                raise self._wrong("terms", f"chunk.{name} as it was given", "it changed; change a copy (clone)")
        if not isinstance(terms, Terms):
            raise self._wrong("terms", "Terms(values, token_losses, means)", _described(terms))
        values, losses, means = terms
        if not isinstance(values, Tensor) or (chunk.hidden.requires_grad and not values.requires_grad):
            expected = "values that autograd derives from the chunk's logits or hidden states"
            raise self._wrong("terms", expected, f"{_described(values)} without a gradient")
        if not isinstance(losses, Tensor) or losses.shape != (chunk.count,) or not losses.is_floating_point():
            expected = f"fp32 token_losses of shape {(chunk.count,)}, one for each target (chunk.last)"
            raise self._wrong("terms", expected, _described(losses))
        self._check_means(means)
        # A sum in bf16, where an objective computes with hidden states only, would lose its digits.
        return terms._replace(values=values.float()) if values.element_size() < 4 else terms

    def _check_means(self, means: Any) -> None:
        if not isinstance(means, Mapping):
            raise self._wrong("terms", "means by name", _described(means))
        for name, pair in means.items():
            if name not in self.names:
                raise self._wrong("terms", f"means among names {self.names}", repr(name))
            is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not is_pair or not all(isinstance(each, Tensor) for each in pair):
                raise self._wrong("terms", f"values and weights, two tensors, in means[{name!r}]", _described(pair))
            if pair[0].shape != pair[1].shape:
                shapes = f"{tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
                raise self._wrong("terms", f"values and weights of one shape in means[{name!r}]", shapes)

    def _wrong(self, method: str, expected: str, got: str) -> ConfigError:
        return ConfigError(f"objective.name={self._name}: {method}: expected {expected}, got {got}")


def _described(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    kind = "" if found.dtype == torch.float32 else f" and {str(found.dtype).removeprefix('torch.')}"
    return f"a tensor of shape {tuple(found.shape)}{kind}"
