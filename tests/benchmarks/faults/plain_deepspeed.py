"""A training script as DeepSpeed's and PyTorch's own examples have it: no more than their calls, and no less.

python plain_deepspeed.py SETTINGS.json     (or under torchrun)

It resumes from `latest`, prints its losses, writes TensorBoard events and saves every few steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "folder": ".",
    "steps": 4,
    "save_every": 2,
    "micro_size": 2,
    "accumulation": 2,
    "lr": 1e-3,
    "clip": 1.0,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "zero_stage": 1,
    "bf16": False,
    "seed": 1234,
    "sequence_length": 64,
    "hidden": 32,
    "rows": 2000,
    "pause_rate": 0.1,
    "data_seed": 0,
}


def train(given: dict[str, Any]) -> None:
    """From the first step, or from the last save, to the last step."""
    import deepspeed
    import torch
    from deepspeed.ops import __compatible_ops__
    from torch import nn
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
    from torch.utils.tensorboard import SummaryWriter

    settings = SETTINGS | given
    folder, length = Path(settings["folder"]), settings["sequence_length"]
    # Ranks of one host would compile a kernel first; killed meanwhile, they leave a lock on which later starts wait.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(settings["seed"])
    model = nn.Sequential(nn.Embedding(256, settings["hidden"]), nn.Linear(settings["hidden"], 256))
    config = {
        "train_micro_batch_size_per_gpu": settings["micro_size"],
        "gradient_accumulation_steps": settings["accumulation"],
        "gradient_clipping": settings["clip"],
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": settings["lr"], "warmup_num_steps": settings["warmup_steps"]},
        },
        "zero_optimization": {"stage": settings["zero_stage"]},
        "bf16": {"enabled": settings["bf16"]},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    data = torch.Generator().manual_seed(settings["data_seed"])
    rows = torch.randint(0, 255, (settings["rows"], length + 1), generator=data)
    pauses = torch.rand(rows.shape, generator=data) < settings["pause_rate"]
    dataset = TensorDataset(rows.masked_fill(pauses, 255))
    sampler = DistributedSampler(dataset, seed=settings["seed"])
    loader = DataLoader(dataset, batch_size=settings["micro_size"], sampler=sampler, drop_last=True)
    _, client = engine.load_checkpoint(str(folder / "checkpoints"))
    board = SummaryWriter(folder / "tensorboard") if rank == 0 else None
    metrics = open(folder / "metrics.jsonl", "a") if rank == 0 else None  # noqa: SIM115 (open to the end)
    epoch, step = 0, (client or {}).get("step", 0)
    while step < settings["steps"]:
        sampler.set_epoch(epoch)
        epoch += 1
        for (batch,) in loader:
            logits = engine(batch[:, :-1]).float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            if not engine.is_gradient_accumulation_boundary():
                continue
            step = engine.global_steps
            if rank == 0:
                print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
                board.add_scalar("loss", loss.item(), step)
                board.flush()
                print(json.dumps({"step": step, "loss": loss.item()}), file=metrics, flush=True)
            if step % settings["save_every"] == 0 or step == settings["steps"]:
                engine.save_checkpoint(str(folder / "checkpoints"), client_state={"step": step})
            if step == settings["steps"]:
                break


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    train(json.loads(Path(arguments[0]).read_text()))
