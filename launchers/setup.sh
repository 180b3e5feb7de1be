#!/usr/bin/env bash
# Makes .venv at the top of the repository and installs the project into it, editable. Sourced by the other launchers.
#
#   PYTHON   interpreter to make it with (default: python3; 3.10 or newer)
#   TORCH    requirement for torch (default: the pinned release)
#   EXTRAS   extras to install (default: quickstart)
#   NO_SETUP set to anything: use the Python environment on PATH as it is (modules, containers)
set -euo pipefail
[ -z "${NO_SETUP:-}" ] || return 0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
constraints=$root/launchers/constraints.txt

"$python" - <<'PY' || { echo "setup: expected Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 10))
PY

stamp=$venv/.installed-$(cat "$constraints" "$root/setup.py" | cksum | cut -d' ' -f1)-${EXTRAS:-quickstart}
if [ ! -e "$stamp" ]; then
    echo "setup: installing into $venv (a few minutes)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
    # torch first and by itself: other packages ask for any torch, and would bring the newest with its CUDA libraries.
    "$venv/bin/pip" install --quiet --disable-pip-version-check "${TORCH:-$(grep '^torch==' "$constraints")}"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" \
        --editable "$root[${EXTRAS:-quickstart}]"
    touch "$stamp"
fi
export PATH=$venv/bin:$PATH
