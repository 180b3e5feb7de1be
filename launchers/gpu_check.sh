#!/usr/bin/env bash
# Runs everything that needs a GPU, in at most 8 minutes on one. The report is complete after every part.
# Without a GPU it runs the parts that a CPU can run. It needs no network.
#
#   [PYTHON=python3] [WHEELS=FOLDER] bash launchers/gpu_check.sh [OUT] [--parts NAMES] [--seconds N]
#
#   OUT      folder of report.json, summary.txt, logs.txt (default: runs/gpu-check)
#   PYTHON   interpreter that has torch (default: python3); nothing is installed into it
#   WHEELS   folder of wheels of missing packages; the check prints which, and the command that fetches them
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" tests/gpu/check.py "$@"
