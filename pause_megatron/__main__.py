"""Entry point of `python -m pause_megatron VERB` and `deepspeed --module pause_megatron VERB`."""

from __future__ import annotations

import os
import sys

# `deepspeed --launcher slurm` runs this folder as a script: its modules must not shadow others of the same names.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

from pause_megatron.cli import main

sys.exit(main())
