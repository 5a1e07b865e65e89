#!/usr/bin/env bash
# Make .venv and install the pinned stack (2 to 5 minutes, 1.8 GB). A second call reuses it.
#     bash scripts/setup.sh [more pip requirements …]
# PYTHON=python3.12 picks the interpreter of a new .venv (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LLAMAFACTORY=llamafactory==0.9.5
python=${PYTHON:-python3}
wanted=$(grep -v '^#' requirements.txt; printf '%s\n' "$LLAMAFACTORY" "$@")

if [ ! -x .venv/bin/python ]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $python is older than Python 3.11, which LLaMA-Factory needs: give another with PYTHON=…" >&2
        exit 2
    fi
    "$python" -m venv .venv
fi
# .venv/installed lists what was installed; as long as it has every wanted line there is nothing to do.
if [ -f .venv/installed ] && [ -z "$(grep -vxF -f .venv/installed <<< "$wanted")" ]; then
    echo "setup: reusing .venv"
else
    .venv/bin/python -m pip install --quiet --requirement requirements.txt "$@"
    .venv/bin/python -m pip install --quiet --no-deps "$LLAMAFACTORY"
    echo "$wanted" >> .venv/installed
    echo "setup: installed the stack into .venv"
fi
