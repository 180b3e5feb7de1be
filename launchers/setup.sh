#!/usr/bin/env bash
# Makes .venv at the top of the repository and installs the project into it, editable. Sourced by the other launchers.
#
#   PYTHON   interpreter to make it with (default: python3; 3.10 to 3.13)
#   TORCH    requirement for torch (default: the pinned release). PyPI's build is for CUDA; for a CPU build give
#            TORCH='torch==2.13.0+cpu', and in PIP_EXTRA_INDEX_URL PyTorch's index for CPUs (see its installation page)
#   VENV     folder of the environment (default: .venv here)
#   EXTRAS   extras to install (default: quickstart)
#   NO_SETUP if set, use the Python environment on PATH as it is (modules, containers)
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/stopping.sh"
[ -z "${NO_SETUP:-}" ] || return 0

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)  # CDPATH would let cd go elsewhere and print
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
constraints=$root/launchers/constraints.txt
extras=${EXTRAS:-quickstart}
log() { echo "setup: $*" >&2; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

version=$(version_of "$python") || version=none
case $version in
    3.1[0-3]) ;;
    *)
        log "error: expected Python 3.10 to 3.13, got $version ($python); set PYTHON=/path/to/python3"
        exit 1
        ;;
esac
if [ -x "$venv/bin/python" ]; then
    found=$(version_of "$venv/bin/python")
    if [ -n "${PYTHON:-}" ] && [ "$found" != "$version" ]; then
        log "error: expected $venv to be of Python $version, as PYTHON is, got $found; remove it, or set VENV"
        exit 1
    fi
    version=$found
fi

# On a terminal pip shows its own progress bars. Elsewhere: a line for each download of 10 MB or more and each long task.
pip_install() {
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
    local -x PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
    if [ -t 2 ]; then
        "${pip[@]}" "$@"
    else
        "${pip[@]}" --progress-bar off "$@" | sed -n -u -E \
            -e 's/^ *Downloading (.*) \(([0-9.]+ GB|[0-9]{2,}\.[0-9]+ MB)\)$/setup:   downloading \1, \2/p' \
            -e 's/^ *Building (wheel|editable) for ([^ ]+) .*started$/setup:   building \2/p' \
            -e 's/^Installing collected packages: .*/setup:   unpacking/p' >&2
    fi
}

begun=$SECONDS
stamp=$venv/.installed-$( (cat "$constraints" "$root/setup.py" "$root/pause_megatron/versions.py" && echo "${TORCH:-}") | cksum | cut -d' ' -f1)-$extras
if [ ! -e "$stamp" ]; then
    log "Python $version, into $venv"
    [ -x "$venv/bin/python" ] || run "$python" -m venv "$venv"
    run pip_install --quiet --upgrade pip setuptools wheel
    # TORCH replaces the pinned torch.
    pins=$venv/constraints.txt
    sed -E "${TORCH:+/^torch([^[:alnum:]_-]|\$)/d}" "$constraints" >"$pins"
    log "computing the size of the download"
    run "$venv/bin/python" "$root/launchers/install_size.py" "$venv" "${TORCH:-torch}" --constraint "$pins" \
        --extra "$extras"
    # torch first: other packages accept any torch, and would install the newest one with its CUDA libraries.
    log "1 of 2: torch"
    run pip_install --constraint "$pins" "${TORCH:-torch}"
    log "2 of 2: pause-megatron[$extras] and its dependencies"
    run pip_install --constraint "$pins" --editable "$root[$extras]"
    touch "$stamp"
    log "done in $((SECONDS - begun)) s, $(du -sh "$venv" | cut -f1) on disk"
fi
export PATH=$venv/bin:$PATH
