"""What follows from a plan: what fits, what would, how long it takes, how often to save."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from pause_megatron.config.gpus import GIB, gpu_of_cuda
from pause_megatron.config.load import load, recipe_names
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.errors import ConfigError
from pause_megatron.plan import GPUS, Assumptions, Cluster, make_plan

TEXT_SIZE = 32_000


def plan(*overrides: str, recipe: str = "c4-1b-pause", gpu: str = "h100", nodes: int = 1, gpus: int = 8, **assumed):
    config = load(recipe=recipe, overrides=overrides)
    assumptions = Assumptions().with_values(assumed)
    return make_plan(config, Cluster(GPUS[gpu], nodes, gpus), text_size=TEXT_SIZE, assumptions=assumptions)


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-94"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_names_that_cuda_gives(cuda_name, name):
    found = gpu_of_cuda(cuda_name)
    assert (found and found.name) == name


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_shards_put_together_are_the_whole_model(tensor):
    layout = plan(f"parallel.tensor={tensor}").layout
    cut = sum(p.numel for p in layout.parameters if not p.replicated) * tensor
    whole = sum(p.numel for p in layout.parameters if p.replicated)
    padding = 2 * layout.model.hidden * (layout.rows * tensor - layout.vocabulary)
    assert cut + whole - padding == parameters(layout.model, layout.vocabulary)


def test_zeros_formulas():
    """Rajbhandari et al. 2020, figure 1: 16 bytes an element, of which each stage divides more."""
    elements = plan().layout.numel
    for stage, whole, shared in ((0, 2 + 12, 0), (1, 2, 12), (2, 2, 12), (3, 0, 14)):
        result = plan(f"engine.zero_stage={stage}", nodes=16)
        memory = result.memory.phases["head"]
        expected = elements * (whole + shared / result.layout.data_parallel)
        assert memory["weights"] + memory["optimizer"] == pytest.approx(expected, rel=0.002), stage


def test_activations_follow_korthikanti():
    """Recomputed, a layer keeps its input: 2 bytes x tokens x hidden; sequence parallelism divides all of it."""
    tokens, hidden = 4 * 2048, 2048
    full = plan("parallel.recompute=full").memory.phases["head"]["activations"]
    deeper = plan("parallel.recompute=full", "model.layers=19").memory.phases["head"]["activations"]
    assert deeper - full == 2 * tokens * hidden
    kept = [
        plan(*keys, "model.layers=19").memory.phases["head"]["activations"]
        - plan(*keys).memory.phases["head"]["activations"]
        for keys in ([], ["parallel.tensor=2", "parallel.sequence=true"])
    ]
    assert kept[0] == 2 * kept[1]


def test_unfused_kernels_keep_more():
    """SwiGLU: the activated gate and the other half; rotary embedding: cosines and sines in each layer anew."""
    tokens = 4 * 2048
    fused, plain = (plan(f"engine.kernels={kind}") for kind in ("triton", "plain"))
    layers, ffn = fused.layout.model.layers, fused.layout.model.ffn
    more = [p.memory.phases["head"]["activations"] for p in (plain, fused)]
    rotations = 4 * 2048 * 128
    assert more[0] - more[1] == layers * (2 * 2 * tokens * ffn + 2 * rotations) - rotations
    chunk = fused.layout.rows * 4096  # bf16 logits of 256 MiB: their fp32 form and its gradient are not there
    heads = [p.memory.phases["head"]["head"] for p in (plain, fused)]
    assert heads[1] == 6 * fused.layout.rows * 2048 + 2 * chunk
    assert heads[0] >= 4 * fused.layout.rows * 2048 + 10 * chunk


def test_gradients_that_are_let_go_of_are_not_kept(tmp_path):
    """DeepSpeed's `immediate_grad_update`: 2 bytes a parameter less, where a step has several micro-batches."""
    gradients = []
    for at_once in (False, True):
        file = tmp_path / f"{at_once}.json"
        given = {"bf16": {"enabled": "auto", "immediate_grad_update": at_once}, "zero_optimization": {"stage": 1}}
        file.write_text(json.dumps(given))
        made = plan(f"engine.ds_config={file}")
        gradients.append(made.memory.phases["head"]["gradients"])
    assert gradients[0] - gradients[1] == 2 * made.layout.numel


@pytest.mark.parametrize("gpu", GPUS)
def test_the_largest_micro_batch_is_the_largest(gpu):
    keys = ["batch.global_size=1024", "batch.micro_size=1"]
    largest = plan(*keys, gpu=gpu).largest_micro_size
    for micro in (2**power for power in range(8)):
        fits = plan("batch.global_size=1024", f"batch.micro_size={micro}", gpu=gpu).fits
        assert fits == (micro <= largest), micro


@pytest.mark.parametrize("gpu", GPUS)
def test_what_memory_alone_allows_is_the_largest_too(gpu):
    allowed = plan(gpu=gpu).memory_micro_size
    for micro, fits in ((allowed, True), (allowed + 1, False)):
        assert plan(f"batch.micro_size={micro}", f"batch.global_size={8 * micro}", gpu=gpu).fits is fits


@pytest.mark.parametrize("windows", [1, 4])
def test_texts_apart_take_no_mask(windows):
    """Nothing grows with the square of the window: keys need not be kept twice, cosines and sines are each window's."""
    differences = []
    for length in (1024, 2048):
        keys = (f"batch.micro_size={windows}", f"data.sequence_length={length}", "parallel.tensor=1")
        apart, joined = (plan(f"data.intra_document_masking={how}", *keys) for how in ("true", "false"))
        model = joined.layout.model
        rotations = 4 * (windows - 1) * length * (model.hidden // model.heads)
        spared = (windows > 1) * windows * length * model.hidden * model.kv_heads // model.heads
        kept = [made.memory.phases["head"]["activations"] for made in (apart, joined)]
        differences.append(kept[0] - kept[1])
        assert differences[-1] == rotations - 2 * model.layers * spared
    assert differences[1] == 2 * differences[0]


def test_nvlink_that_joins_two_carries_no_larger_ring():
    keys = ("parallel.sequence=false", "engine.precision=bf16")
    for tensor, speed in ((2, 300e9), (4, 64e9)):
        (wire, *_) = [
            wire
            for wire in plan(*keys, f"parallel.tensor={tensor}", gpu="h100-94").wires
            if wire.traffic.purpose == "layer activations"
        ]
        assert wire.seconds == pytest.approx(wire.traffic.wire_bytes / (speed * 0.8))


@pytest.mark.parametrize(
    ("recipe", "keys", "gpu"),
    [
        ("c4-1b-pause", ["batch.micro_size=64"], "a100-40"),
        ("c4-7b-pause", ["parallel.tensor=1", "parallel.sequence=false"], "a100-40"),
        ("c4-7b-std", ["engine.zero_stage=0"], "a100-40"),
    ],
)
def test_what_is_said_to_fit_does(recipe, keys, gpu):
    result = plan(*keys, recipe=recipe, gpu=gpu)
    assert not result.fits and result.remedies
    for remedy in result.remedies:
        again = plan(*keys, *remedy.overrides, recipe=recipe, gpu=gpu)
        assert again.fits, remedy
        assert again.footprint.total == pytest.approx(remedy.total)


def test_a_model_that_no_change_makes_fit():
    result = plan("model.layers=400", "engine.zero_stage=0", gpus=1, gpu="a100-40")
    assert not result.fits
    assert result.largest_micro_size is None


def test_flops_tokens_and_days_by_hand():
    result = plan(nodes=16, mfu=0.5)
    model, batch = result.layout.model, result.layout.batch
    # Every row but those before a pause reaches the output layer (a tenth of 2,048 windows' tokens are pauses).
    raw, rows = 512 * 2048, 128 * result.layout.target_rows
    flops = flops_per_token(model, 32_001, 2048) * raw - 6 * 32_001 * model.hidden * (raw - rows)
    assert 0.89 < rows / raw < 0.91
    assert result.time.model_flops == flops
    assert result.time.parts is None
    assert result.time.compute_seconds == pytest.approx(flops / (128 * 989.4e12 * 0.5))
    # bf16 stage 1: an all-reduce of fp32 gradients and an all-gather of bf16 weights, through 8 adapters a node.
    wire = (2 * 4 + 2) * 127 / 128 * result.layout.flat_numel
    assert result.time.exposed_seconds == pytest.approx(wire / (400e9 * 0.8))
    assert result.mfu < 0.5
    steps = math.ceil(21e9 / (512 * 2048))
    assert batch.steps == steps
    assert result.run_seconds == pytest.approx(steps * result.time.seconds / (1 - result.saving.lost))


def test_overlap_hides_reductions_at_stage_2_and_gathers_at_stage_3_only():
    keys = ("parallel.tensor=1", "parallel.sequence=false", "batch.micro_size=4")
    for name, hidden in (("zero1", []), ("zero2-overlap", ["gradients"]), ("zero3", ["gradients", "parameters"])):
        wires = plan(*keys, f"engine.ds_config={name}", recipe="c4-7b-pause", nodes=8, gpu="h200").wires
        assert [w.traffic.purpose for w in wires if w.exposed_seconds < w.seconds] == hidden
        assert all(w.exposed_seconds == pytest.approx(0.3 * w.seconds) for w in wires if w.traffic.purpose in hidden)


def test_recomputation_costs_a_forward_pass_of_the_layers():
    plain, again = plan(), plan("parallel.recompute=full")
    ratio = again.time.executed_flops / plain.time.executed_flops
    assert plain.time.executed_flops == plain.time.model_flops == again.time.model_flops
    assert 1.30 < ratio < 4 / 3  # the head does not run again


def test_the_checkpoint_interval_loses_least():
    result = plan(nodes=16)
    best = result.saving
    assert best.interval_seconds == pytest.approx(math.sqrt(2 * best.seconds * best.mtbf_seconds))
    assert best.mtbf_seconds == pytest.approx(6300 * 3600 / 16)
    for every in (best.every // 2, best.every * 2):
        other = plan(f"checkpoint.every={every}", nodes=16).saving
        assert other.lost_as_configured > best.lost


def test_a_checkpoint_holds_three_fp32_copies():
    result = plan("parallel.tensor=2", "engine.zero_stage=3")
    elements = sum(p.numel for p in result.layout.parameters) * 2
    assert result.saving.bytes == 12 * elements


def test_small_gains_of_more_data_parallel_ranks_are_shown():
    near, far = plan(nodes=1), plan(nodes=16)
    assert all(not wire.crosses_nodes and not wire.inter_node_bytes for wire in near.wires)
    assert all(wire.crosses_nodes for wire in far.wires)
    assert far.mfu < near.mfu


def test_tensor_parallelism_across_nodes_is_warned_about():
    assert "spans nodes of 2 GPUs" in plan("parallel.tensor=4", nodes=4, gpus=2).warnings[0]
    assert (
        "does not divide the 6 GPUs" in plan("parallel.tensor=4", "batch.global_size=12", nodes=2, gpus=6).warnings[0]
    )
    assert plan("parallel.tensor=4").warnings == ()


def test_stage_2_is_warned_about_its_traffic():
    assert "after each of 16 micro-batches" in plan("engine.zero_stage=2").warnings[0]


def test_offload_moves_states_to_the_host():
    kept, moved = plan("engine.ds_config=zero3"), plan("engine.ds_config=zero3-offload")
    assert moved.memory.host_bytes > 0 == kept.memory.host_bytes
    assert moved.footprint.total < kept.footprint.total
    assert moved.time.offload_seconds > 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_plans_on_a_node_of_h200(name):
    result = plan(recipe=name, gpu="h200", gpus=4)
    assert result.fits, result.footprint.total / GIB


def test_assumptions_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'node_mtbf_hours'"):
        plan(node_mtbf_hour=3)
    with pytest.raises(ConfigError, match="expected a number > 0, got -1"):
        plan(mfu=-1)
    assert plan(mfu=0.3).assumptions.mfu.source == "given"


def test_a_plan_for_1024_ranks_needs_no_torch_and_little_memory():
    code = (
        "import sys; from pause_megatron.cli import main;"
        "code = main(['plan', '--recipe', 'c4-1b-pause', '--nodes', '128', 'batch.global_size=4096']);"
        "assert code == 0 and not {'torch', 'numpy', 'deepspeed'} & set(sys.modules);"
        # Not ru_maxrss: that is inherited from the process that forks, through exec.
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'));"
        "assert int(status['VmHWM'].split()[0]) < 1_000_000"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "128 x 8 = 1024" in done.stdout
