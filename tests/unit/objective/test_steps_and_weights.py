"""Rows of runs, weights of targets and their refusals, chunks that split no run, and the objective of the README."""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.data.batches.batch import collate
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.objective import Chunk, LossPlan, Objective, Terms, loss_plan
from pause_megatron.objective.chunk import Columns

ANYTIME = loss_plan(ObjectiveSection(name="anytime", discount=0.5))
PAUSES = range(90, 92)
PAGE = Path(__file__).resolve().parents[3] / "pause_megatron" / "objective" / "README.md"


def sample(tokens: list[int], segments: list[int] | None = None, weights: list[float] | None = None) -> dict:
    """A window of these inputs; every next token that is text is a target."""
    ids = torch.tensor(tokens)
    after = torch.cat([ids[1:], torch.tensor([1])])
    item = {
        "tokens": ids,
        "labels": torch.where(after < 90, after, 0),
        "loss_mask": (after < 90).float(),
        "position_ids": torch.arange(len(tokens)),
    }
    if segments is not None:
        item["segments"] = torch.tensor(segments, dtype=torch.int32)
    if weights is not None:
        item["weights"] = torch.tensor(weights)
    return item


def runs(plan: LossPlan, *samples: dict) -> list[list[int]]:
    steps = collate(samples, sample_ids=range(len(samples)), pause_ids=PAUSES, plan=plan).steps
    return [part.tolist() for part in steps.rows.split(steps.sizes.tolist())]


def test_a_run_is_a_text_token_and_the_pauses_after_it_within_a_segment():
    assert runs(ANYTIME, sample([5, 90, 91, 6, 7, 90])) == [[0, 1, 2], [3], [4, 5]]
    # A window, and a segment, that begins with pauses: the run starts at its first pause.
    assert runs(ANYTIME, sample([90, 91, 6, 7])) == [[0, 1], [2], [3]]
    assert runs(ANYTIME, sample([5, 90, 90, 6], [0, 0, 1, 1])) == [[2], [3]]
    # Two windows: rows are position x 2 + window.
    assert runs(ANYTIME, sample([5, 90, 6]), sample([90, 5, 6])) == [[1], [0, 2], [3], [4], [5]]
    assert runs(loss_plan(ObjectiveSection(z_loss=1.0)), sample([5, 90, 91, 6])) == [[2], [3]]


def test_weights_are_those_of_steps_and_targets():
    batch = collate([sample([5, 90, 91, 6])], sample_ids=[0], pause_ids=PAUSES, plan=ANYTIME)
    assert batch.steps.weights.tolist() == [1, 0.5, 0.25, 1] and batch.weight == 2.75
    assert batch.steps.is_pause.tolist() == [False, True, True, False]
    packed = batch.packed(pinned=False)
    assert packed.steps.weights.untyped_storage().data_ptr() == packed.tokens.untyped_storage().data_ptr()
    assert torch.equal(packed.steps.rows, batch.steps.rows) and packed.weight == 2.75
    assert batch.steps.without_targets().spans(4) == [] and batch.steps.without_targets().weight_sum == 0


def test_no_chunk_splits_a_run():
    steps = collate([sample([5, 90, 91, 6, 7, 90])], sample_ids=[0], pause_ids=PAUSES, plan=ANYTIME).steps
    for chunk in range(1, 9):
        spans = steps.spans(chunk)
        assert [n for numbers, _ in spans for n in numbers] == [0, 1, 2]
        assert [row for _, rows in spans for row in rows] == list(range(6))
        assert all(len(rows) <= chunk or len(numbers) == 1 for numbers, rows in spans)
        assert all(rows.start in (0, 3, 4) for _, rows in spans)
        assert steps.longest(spans[0][0]) == 3


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused_with_its_sample(value):
    plan = loss_plan(ObjectiveSection(token_weights="side"))
    good, bad = sample([5, 6, 7], weights=[0.0, 0.0, 1.0]), sample([5, 6, 7], weights=[1.0, value, 1.0])
    with pytest.raises(DataError, match=r"sample 8, position 1: expected a weight of 0 or more for its target 7"):
        collate([good, bad], sample_ids=[4, 8], pause_ids=PAUSES, plan=plan)
    with pytest.raises(ConfigError, match=r"expected samples with weights of data.side"):
        collate([sample([5, 6, 7])], sample_ids=[4], pause_ids=PAUSES, plan=plan)
    shape = LossPlan(plan.objective, lambda ids: np.ones(1), "m:f")
    with pytest.raises(ConfigError, match=r"objective.token_weights=m:f: expected a number for each of 3 targets"):
        collate([sample([5, 6, 7])], sample_ids=[4], pause_ids=PAUSES, plan=shape)


def test_the_default_has_no_plan_and_unknown_names_are_refused():
    assert loss_plan(ObjectiveSection()) is None
    for name, message in (
        ("nothing", "expected one of cross_entropy, anytime"),
        ("no_such_module:x", "expected the module no_such_module in this folder or on PYTHONPATH"),
        ("math:pi", "a float without runs, names, weights, terms"),
    ):
        with pytest.raises(ConfigError, match=message):
            loss_plan(ObjectiveSection(name=name))
    with pytest.raises(ConfigError, match=r"objective.token_weights: expected a function, got a float"):
        loss_plan(ObjectiveSection(token_weights="math:pi"))
    with pytest.raises(ConfigError, match=r"objective.token_weights=math:dist: expected a function of \(ids\), got \("):
        loss_plan(ObjectiveSection(token_weights="math:dist"))
    plan = loss_plan(ObjectiveSection(token_weights="json:loads"))
    with pytest.raises(
        ConfigError, match=r"token_weights=json:loads: expected a result, got TypeError: .* \(.*py:\d+\)"
    ):
        collate([sample([5, 6, 7])], sample_ids=[4], pause_ids=PAUSES, plan=plan)


def test_the_objective_of_the_page_is_one(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "my_losses.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = loss_plan(ObjectiveSection(name="my_losses:Focal", discount=0.5))
    sys.modules.pop("my_losses")
    assert isinstance(plan.objective, Objective) and plan.objective.runs is False
    steps = collate([sample([5, 90, 6])], sample_ids=[0], pause_ids=PAUSES, plan=plan).steps
    assert steps.rows.tolist() == [1, 2] and steps.weight_sum == 2


class Own:
    """An objective in which one part is replaced by a wrong one."""

    runs, names = True, ("probability",)

    def __init__(self, section: ObjectiveSection) -> None: ...

    def weights(self, index, length, weight):
        return weight

    def terms(self, chunk: Chunk) -> Terms:
        return self.made(chunk, -chunk.log_probability(chunk.targets))

    def made(self, chunk: Chunk, losses: torch.Tensor) -> Terms:
        return Terms(losses, chunk.last(losses), {"probability": (torch.exp(-losses), chunk.weights)})


class WithParameters(torch.nn.Linear):
    """A module, whose parameters the run does not train."""

    runs, names, weights, terms = False, (), Own.weights, Own.terms

    def __init__(self) -> None:
        super().__init__(2, 2)


WRONG = {
    "runs: expected True or False, got 'no'": {"runs": "no"},
    "objective.z_loss=0.1: expected an objective without a mean named z_loss": {"names": ("z_loss",)},
    "parameters: expected none that requires a gradient, for no optimizer has them, got some": {
        "__new__": lambda cls, section: WithParameters()
    },
    "names: expected a tuple of strings, each once, got 'probability'": {"names": "probability"},
    "names: expected a tuple of strings, each once, got ('a', 'a')": {"names": ("a", "a")},
    "objective.name=my_own:Own: expected a function of (section), got ()": {"__init__": lambda self: None},
    "got AttributeError: 'ObjectiveSection' object has no attribute 'nosuch' (": {
        "__init__": lambda self, section: section.nosuch
    },
    "objective.name=my_own:Own: terms: expected a function of (chunk), got (chunk, step)": {
        "__init__": lambda self, section: setattr(self, "terms", lambda chunk, step: None)
    },
    "objective.name=my_own:Own: weights: expected a result, got KeyError: 5 (": {"weights": lambda self, *_: {}[5]},
    "objective.name=my_own:Own: weights: expected a real tensor of shape (4,), got a None": {
        "weights": lambda self, *_: None
    },
    "weights: expected a real tensor of shape (4,), got a tensor of shape (3,": {
        "weights": lambda self, i, n, w: w[1:]
    },
    "weights: expected finite numbers of 0 or more, got -1.0 for step 2 of a run of 3 rows": {
        "weights": lambda self, index, length, weight: weight * (1.0 - index)
    },
    "of 0 or more, got nan for step 0 of a run of 3 rows": {"weights": lambda self, i, n, w: w * math.nan},
    "terms: expected Terms(values, token_losses, means), got a tensor of shape (4,)": {"made": lambda self, c, x: x},
    "real tensor of shape (4,), got a tensor of shape (4,) and complex64": {"weights": lambda self, i, n, w: w + 0j},
    "(chunk.last), got a tensor of shape (2,) and int64": {"made": lambda self, c, x: Terms(x, c.last(x).long())},
    "terms: expected means by name, got a list": {"made": lambda self, c, x: Terms(x, c.last(x), [("probability", x)])},
    "two tensors, in means['probability'], got a tuple": {
        "made": lambda self, c, x: Terms(x, c.last(x), {"probability": (x, 1.0)})
    },
    "two tensors, in means['probability'], got a tensor of shape (4,)": {
        "made": lambda self, c, x: Terms(x, c.last(x), {"probability": x})
    },
    "got a tensor of shape (4,) without a gradient": {"made": lambda self, c, x: Terms(x.detach(), c.last(x))},
    "expected fp32 token_losses of shape (2,)": {"made": lambda self, c, x: Terms(x, x)},
    "(chunk.last), got a tensor of shape (1,)": {"made": lambda self, c, x: Terms(x, x.mean()[None])},
    "means among names ('probability',), got 'other'": {
        "made": lambda self, c, x: Terms(x, c.last(x), {"other": (x, x)})
    },
    "one shape in means['probability'], got (4,) and (2,)": {
        "made": lambda self, c, x: Terms(x, c.last(x), {"probability": (x, c.last(x))})
    },
}


def changing(name: str, change) -> dict:
    """An objective that changes a tensor of the chunk before it computes the terms."""

    def terms(self, chunk: Chunk) -> Terms:
        change(chunk)
        return self.made(chunk, -chunk.log_probability(chunk.targets))

    return {f"my_own:Own: terms: expected chunk.{name} as it was given, got it changed; change": {"terms": terms}}


WRONG |= {
    **changing("weights", lambda chunk: chunk.weights.mul_(2)),
    **changing("targets", lambda chunk: chunk.targets.clamp_(max=5)),
    **changing("is_pause", lambda chunk: setattr(chunk, "is_pause", ~chunk.is_pause)),
}


def one_chunk(plan: LossPlan, group: dist.ProcessGroup) -> Chunk:
    """The chunk of a window of two targets, 3 and 1 rows."""
    steps = collate([sample([5, 90, 91, 6])], sample_ids=[0], pause_ids=PAUSES, plan=plan).steps
    return Chunk(
        torch.zeros(4, 92),
        torch.zeros(4, 8),
        targets=torch.tensor([6, 1]),
        sizes=steps.sizes,
        is_pause=steps.is_pause,
        weights=steps.weights,
        longest=3,
        columns=Columns(0, PAUSES, PAUSES, group),
        differentiable=True,
    )


def test_what_an_objective_returns_is_checked(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_own", module := types.ModuleType("my_own"))
    alone = types.SimpleNamespace(size=lambda: 1)
    module.Own = Own
    plan = loss_plan(ObjectiveSection(name="my_own:Own", z_loss=0.1))
    assert set(plan.objective.terms(one_chunk(plan, alone)).means) == {"probability", "z_loss"}
    for message, change in WRONG.items():
        module.Own = type("Own", (Own,), change)
        with pytest.raises(ConfigError, match=re.escape(message)):
            plan = loss_plan(ObjectiveSection(name="my_own:Own", z_loss=0.1))
            plan.objective.terms(one_chunk(plan, alone))


def test_what_a_user_s_code_changes_or_returns_again_changes_nothing_else(monkeypatch):
    """A buffer of weights that is used again, ids that are changed in place, sums in bf16."""
    alone, buffer = types.SimpleNamespace(size=lambda: 1), torch.ones(4)
    module = types.ModuleType("my_own")
    monkeypatch.setitem(sys.modules, "my_own", module)
    kept = {"weights": lambda self, index, length, weight: buffer}
    module.Own = type("Own", (Own,), kept)
    plan = LossPlan(loss_plan(ObjectiveSection(name="my_own:Own")).objective, lambda ids: np.minimum(ids, 0, out=ids))
    batch = collate([sample([5, 90, 91, 6])], sample_ids=[0], pause_ids=PAUSES, plan=plan)
    buffer.zero_()
    assert batch.steps.weights.tolist() == [1] * 4 and batch.targets.tolist() == [6, 1]
    none = sample([5, 90, 91, 90], weights=[1.0] * 4) | {"loss_mask": torch.zeros(4)}
    module.Own = type("Own", (Own,), {"weights": lambda self, index, length, weight: weight * (index == index.max())})
    largest = LossPlan(loss_plan(ObjectiveSection(name="my_own:Own")).objective, lambda ids: ids / ids.max(), "m:f")
    assert collate([none], sample_ids=[0], pause_ids=PAUSES, plan=largest).steps.weight_sum == 0

    chunk, ids = one_chunk(plan, alone), torch.tensor([3, 3, 3, 3])
    chunk._logits[:, 3:5] = torch.tensor([1.0, 2.0])
    first = chunk.logit(ids)
    ids.add_(1)
    second = chunk.logit(ids)
    ids.add_(1)
    assert (first.tolist(), second.tolist()) == ([1.0] * 4, [2.0] * 4)
    gradient, _ = chunk.gradient((first + 3 * second).sum())
    assert torch.equal(gradient[:, 2:7], torch.tensor([0.0, 1.0, 3.0, 0.0, 0.0]).expand(4, 5))
    for wrong in (92, -1, torch.tensor([0, 1, 2, 92])):
        with pytest.raises(RuntimeError, match=r"chunk.logit: expected ids from 0 to 91"):
            chunk.logit(wrong)

    halves = {"made": lambda self, c, x: Terms((c.hidden.sum(1) + 1).bfloat16(), c.last(x))}
    module.Own = type("Own", (Own,), halves)
    terms = loss_plan(ObjectiveSection(name="my_own:Own")).objective.terms(one_chunk(plan, alone))
    assert terms.values.dtype == torch.float32
