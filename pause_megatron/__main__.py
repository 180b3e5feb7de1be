"""`python -m pause_megatron VERB` and `deepspeed --module pause_megatron VERB`."""

from __future__ import annotations

import sys

from pause_megatron.cli import main

sys.exit(main())
