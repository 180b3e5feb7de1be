"""Keywords of generation before it took records: they work until 0.2, with a warning that gives the record."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from pause_megatron.inference.limits import DEFAULT_LIMITS
from pause_megatron.inference.sampling import GREEDY

if TYPE_CHECKING:
    from pause_megatron.inference.generate import PauseGenerator

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_RECORD_OF = {
    **dict.fromkeys(("location", "filler", "prefix_attention"), "prompting"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed", "rows"), "sampling"),
    **dict.fromkeys(("stop", "ignore_eos"), "limits"),
}


def accept_earlier_keywords(
    method: Callable[Concatenate[PauseGenerator, _Arguments], _Result],
) -> Callable[Concatenate[PauseGenerator, _Arguments], _Result]:
    """Let a method of `PauseGenerator` take `location=` and the like in place of `prompting=Prompting(location=...)`.

    Args:
        method: `generate` or `score`.
    """

    @functools.wraps(method)
    def wrapper(self: PauseGenerator, *args: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        earlier = {name: keywords.pop(name) for name in _RECORD_OF if name in keywords}
        return method(self, *args, **(_with_records(self, earlier, keywords) if earlier else keywords))

    return wrapper


def _with_records(generator: PauseGenerator, earlier: dict[str, Any], keywords: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {}
    for name, value in earlier.items():
        fields.setdefault(_RECORD_OF[name], {})[name] = value
    written = (
        f"{record}={record.capitalize()}({', '.join(f'{name}={value!r}' for name, value in each.items())})"
        for record, each in fields.items()
    )
    warnings.warn(
        f"{', '.join(f'{name}=' for name in earlier)}: write {', '.join(written)}; the old keywords work until 0.2",
        FutureWarning,
        stacklevel=4,  # the caller of generate, outside of torch.no_grad
    )
    records = dict(keywords)
    if "prompting" in fields:
        given = keywords.get("prompting")
        pause = generator.pause if given is None else replace(generator.pause, prompting=given)
        records["prompting"] = pause.override(**fields["prompting"])
    if "sampling" in fields:
        records["sampling"] = replace(keywords.get("sampling", GREEDY), **fields["sampling"])
    if "limits" in fields:
        records["limits"] = replace(keywords.get("limits", DEFAULT_LIMITS), **fields["limits"])
    return records
