"""Definition of a host wait, tested on a CPU: every tensor except the host's counts as a device tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.host_waits import waits_of
from torch._subclasses.fake_tensor import FakeTensorMode

from pause_megatron.engine.waits import MICRO_BATCH, STEP, HostWaits, _copy_waits, in_micro_batch, upload

X = torch.arange(5.0) - 2
MASK = X > 0


def backward() -> None:
    weight = torch.ones(3, requires_grad=True)
    product = weight * 2
    product.register_hook(lambda gradient: gradient * gradient.sum().item())
    product.sum().backward()


WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "bool": lambda: bool(X[0] > 0),
    "if": lambda: 1 if MASK.any() else 0,
    "float": lambda: float(X[0]),
    "format": lambda: f"{X[0]:.3f}",
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "mask as index": lambda: X[MASK],
    "values by mask": lambda: X.clone().__setitem__(MASK, torch.zeros(2)),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, MASK),
    "tensor on the device": lambda: torch.tensor(3.0, device="cpu"),
    "new_tensor": lambda: X.new_tensor(3.0),
    "in the backward pass": backward,
}
ENQUEUEING: dict[str, Callable[[], object]] = {
    "full": lambda: X.new_full((), 3.0),
    "number by mask": lambda: X.clone().__setitem__(MASK, 0.0),
    "where with values": lambda: torch.where(MASK, X, -X),
    "masked_fill": lambda: X.masked_fill(MASK, 1.0),
    "rows": lambda: X[torch.arange(2, device="cpu")],
    "upload": lambda: X + upload([1.0], X.device),
    "numbers of the host": lambda: bool(torch.isfinite(torch.stack([torch.tensor(3.0)]).sqrt()).all()),
    "number of the host as a factor": lambda: X.clone().mul_(torch.tensor(2.0)),
}


@pytest.mark.parametrize("case", WAITING)
def test_a_wait_is_counted_once_and_its_place_named(case):
    (wait,) = waits_of(WAITING[case])
    assert wait.place == STEP and __file__.endswith(wait.where.partition(":")[0])


@pytest.mark.parametrize("case", ENQUEUEING)
def test_what_only_enqueues_does_not_count(case):
    assert not waits_of(ENQUEUEING[case])


def test_uploaded_numbers_count_as_device_tensors():
    assert len(waits_of(lambda: upload([1.0, 2.0], torch.device("cpu")).tolist())) == 1


@pytest.mark.parametrize(
    ("case", "waits"),
    {
        "from": (lambda host, device: device.to("cpu"), 1),
        "cpu": (lambda host, device: device.cpu(), 1),
        "made there": (lambda host, device: torch.tensor([1.0], device="cuda"), 1),
        "a number of the host": (lambda host, device: device * torch.tensor(2.0), 0),
        "on the host": (lambda host, device: host.tolist(), 0),
        "on the device": (lambda host, device: device.to(torch.bfloat16), 0),
    }.values(),
)
def test_copies_between_host_and_gpu(case, waits):
    """On fake tensors, which have a device and no memory."""
    host = torch.zeros(4)
    with FakeTensorMode(allow_non_fake_inputs=True), HostWaits("cuda") as record:
        case(host, torch.empty(4, device="cuda"))
    assert len(record.waits) == waits


def test_a_copy_to_the_gpu_waits_unless_it_is_asynchronous_and_pinned(monkeypatch):
    """A torch without CUDA makes no such copy, not even of fake tensors: the rule by itself."""
    host, there = torch.zeros(4), {"device": torch.device("cuda")}
    assert _copy_waits("_to_copy", (host,), there)
    assert _copy_waits("_to_copy", (host,), {**there, "non_blocking": True})
    with FakeTensorMode():
        device = torch.empty(4, device="cuda")
    assert _copy_waits("copy_", (device, host), {}) and _copy_waits("copy_", (device, host, True), {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    assert not _copy_waits("_to_copy", (host,), {**there, "non_blocking": True})
    assert not _copy_waits("copy_", (device, host, True), {})
    assert _copy_waits("_to_copy", (host,), there) and _copy_waits("copy_", (device, host), {})


def test_places_are_distinguished():
    with HostWaits() as record:
        X.tolist()
        with in_micro_batch():
            X.tolist()
            X.sum().item()
    X.tolist()
    assert (record.per(MICRO_BATCH, 2), record.per(STEP, 1)) == (1.0, 1.0)
    assert "1 x micro-batch: tolist at" in record.table()
