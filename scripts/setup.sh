#!/usr/bin/env bash
# Make .venv and install the pinned stack (2 to 5 minutes, 1.8 GB). A second call reuses it.
#     bash scripts/setup.sh [more pip requirements …]
# QUIET=1 says nothing but errors. PYTHON=python3.12 picks the interpreter of a new .venv (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LLAMAFACTORY=llamafactory==0.9.5
python=${PYTHON:-python3}
say() { [ "${QUIET:-}" ] || echo "setup: $1" >&2; }
wanted=$(grep -v '^#' requirements.txt; printf '%s\n' "$LLAMAFACTORY" "$@")

if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: $python is no Python 3.11 or newer, which LLaMA-Factory needs: name one with PYTHON=…" >&2
        exit 2
    fi
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        echo "error: $python cannot make a virtual environment: install its venv package (Debian: python3-venv)" >&2
        exit 2
    fi
fi
# .venv/installed lists what was installed; as long as it has every wanted line there is nothing to do.
if [ -f .venv/installed ] && [ -z "$(grep -vxF -f .venv/installed <<< "$wanted")" ]; then
    say "reusing .venv"
else
    .venv/bin/python -m pip install --quiet --requirement requirements.txt "$@"
    .venv/bin/python -m pip install --quiet --no-deps "$LLAMAFACTORY"
    echo "$wanted" > .venv/installed
    say "installed the stack into .venv"
fi
