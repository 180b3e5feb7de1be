"""The part of the suite that runs on every tested set of versions: `pytest -m compat`.

It touches each place where torch, DeepSpeed, megatron-core, transformers and numpy meet this package: samples from the
stock builder, the model's losses and gradients, the engine at each ZeRO stage, checkpoints that become Hugging Face
folders, the lines for a Megatron-LM script, and the tiny recipe as a program.
"""

from __future__ import annotations

# Files, folders or single tests (a parametrised test by its name up to, or with, the bracket), relative to tests/.
PARTS = (
    "numerics/",
    "unit/test_versions.py",
    "unit/cli/test_doctor.py",
    "unit/data/windows/test_dataset.py",
    "unit/data/windows/test_build.py",
    "distributed/test_engine.py",
    "distributed/test_model_zero.py",
    "distributed/test_counts.py",
    "distributed/test_group_counts.py",
    "distributed/test_host_waits.py",
    "integration/test_topologies.py::test_the_reference_learns_on_unequal_numbers_of_targets",
    "integration/test_topologies.py::test_every_topology_gives_one_loss_list[2-1-False-1-1]",
    "integration/test_topologies.py::test_every_topology_gives_one_loss_list[2-2-True-3-2]",
    "integration/test_export.py",
    "integration/test_megatron_script.py",
    "integration/test_megatron_checkpoints.py::test_megatron_lm_itself_loads_an_export_with_those_options",
    "integration/test_golden.py",
)


def is_part(node_id: str) -> bool:
    """Whether a test belongs to it, by its node id relative to the repository."""
    test = node_id.removeprefix("tests/")
    begins = [part if part.endswith("/") else (f"{part}::", f"{part}[") for part in PARTS]
    return test in PARTS or any(test.startswith(begin) for begin in begins)
