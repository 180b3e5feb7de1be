"""The lines that data/README.md gives to people with their own Megatron-LM script, driven through the stock builder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import ByteTokenizer, make_config, make_dataset, paragraphs, write_corpus

README = Path(__file__).resolve().parents[2] / "pause_megatron" / "data" / "README.md"

# What a pretrain_gpt.py has around those lines. Megatron-LM's own `megatron.training` is not on any package index.
BEFORE = """
import sys
from argparse import Namespace

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

prefix, folder, rank, world_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.distributed.init_process_group(
    "gloo", rank=rank, world_size=world_size, store=torch.distributed.FileStore(folder + "/store", world_size)
)
args = Namespace(
    seed=1234, seq_length=128, split="8,2,0", data_cache_path=folder + "/cache", data_path=["1", prefix, "1", prefix],
    reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=True, make_vocab_size_divisible_by=64,
    create_attention_mask_in_dataloader=False, tensor_model_parallel_size=2, padded_vocab_size=None,
)


def get_args():
    return args


def get_tokenizer():
    return NullTokenizer(256)  # ids 0..255 and EOD 256


def get_blend_and_blend_per_split(args):
    return get_blend_from_list(args.data_path), None


def is_dataset_built_on_rank():
    return True
"""

AFTER = """
pad_vocabulary(args)
assert args.padded_vocab_size == 384, args.padded_vocab_size
pause = PauseTokenizer(get_tokenizer()).pause_id
assert pause == 257 < args.padded_vocab_size

train, valid, test = train_valid_test_datasets_provider([60, 10, 0])
assert test is None and len(train) >= 60 and len(valid) >= 10
fractions = []
for dataset in (train, valid):
    for number in range(10):
        sample = dataset[number]
        assert sample["tokens"].shape == sample["labels"].shape == sample["loss_mask"].shape == (128,)
        before_pause = sample["tokens"][1:] == pause
        assert not sample["loss_mask"][:-1][before_pause].any()
        assert (sample["labels"] != pause).all()
        after_eod = (sample["tokens"] == 256) & (sample["labels"] != 0)
        assert not sample["loss_mask"][after_eod].any()
        fractions.append((sample["tokens"] == pause).float().mean().item())
assert 0.06 < sum(fractions) / len(fractions) < 0.12, fractions
assert not [name for name in sys.modules if name.split(".")[0] == "deepspeed"], "deepspeed was imported"
assert not [name for name in sys.modules if name.startswith(("pause_megatron.engine", "pause_megatron.train"))]
numpy.save(f"{folder}/tokens-{rank}.npy", torch.stack([train[number]["tokens"] for number in range(60)]).numpy())
print("done", rank)
"""


def blocks(heading: str) -> list[str]:
    """The README's Python blocks whose first line is a comment that begins so."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in found if block.startswith(f"# {heading}")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "speeches", paragraphs(40))


def test_the_readmes_lines_in_a_megatron_script(corpus: str, tmp_path: Path) -> None:
    """Two ranks, a blend, the stock builder; DeepSpeed is not imported; both ranks see the same samples."""
    script = tmp_path / "pretrain_gpt.py"
    lines = blocks("pretrain_gpt.py")
    assert len(lines) == 2
    script.write_text("\n".join([BEFORE, *lines, AFTER]), encoding="utf-8")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), corpus, str(tmp_path), str(rank), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            assert f"done {rank}" in output
    finally:
        for process in ranks:
            process.kill()
    assert (tmp_path / "tokens-0.npy").read_bytes() == (tmp_path / "tokens-1.npy").read_bytes()


def test_the_readmes_policy(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks("my_policies.py")
    (tmp_path / "my_policies.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for window in ("exact", "trim"):
        config = make_config(corpus, 256, pause_placement="my_policies:after_punctuation", pause_window=window)
        dataset = make_dataset(corpus, config, 20)
        stops = 0
        for number in range(20):
            tokens = dataset[number]["tokens"].numpy()
            is_stop = np.isin(tokens[:-1], [33, 46, 63])
            assert (tokens[1:][is_stop] == ByteTokenizer.pause_id).all()
            assert (tokens == ByteTokenizer.pause_id).sum() >= 20
            stops += is_stop.sum()
        assert stops > 10
