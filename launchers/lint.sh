#!/usr/bin/env bash
# Sets up a fresh machine and checks style, form and types: ruff check, ruff format, mypy. About half a minute.
# Each check runs, also when one before it failed.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
EXTRAS=${EXTRAS:-dev} source launchers/setup.sh

failed=()
check() { echo "lint: $*" >&2; run python -m "$@" || failed+=("$*"); }
check ruff check .
check ruff format --check .
check mypy
if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
