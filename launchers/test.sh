#!/usr/bin/env bash
# Sets up a fresh machine and runs the tests. Arguments go to pytest: `bash launchers/test.sh tests/unit -k pause`.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
EXTRAS=${EXTRAS:-test} source launchers/setup.sh

# One thread a rank: the tests start up to four ranks, and results are compared bit for bit.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two files at a time: many tests wait for other processes. More than two would need more memory than most laptops have.
exec python -m pytest -n "$(($(getconf _NPROCESSORS_ONLN) > 1 ? 2 : 0))" --dist loadfile --no-loadscope-reorder "$@"
