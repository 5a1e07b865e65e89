#!/usr/bin/env bash
# Make .venv and install the pinned stack, requirements.txt (2 to 5 minutes, 2.3 GB), by uv where it is there, else by
# pip. A second call reuses it.
#     bash scripts/setup.sh [more pip requirements …]
# QUIET=1 says nothing but errors. PYTHON=python3.12 picks the interpreter of a new .venv (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' scripts/setup.sh; exit ;;
        -*) echo "error: unknown argument $argument: there are --help and pip requirements, e.g. wandb" >&2; exit 2 ;;
    esac
done

python=${PYTHON:-python3}
say() { [ "${QUIET:-}" ] || echo "setup: $1" >&2; }
wanted=$(grep -v '^#' requirements.txt; printf '%s\n' "$@")

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
    exit
fi
# uv is faster; it does not read pip's settings, e.g. a mirror, so what it cannot install pip may.
# Without bytecode, which pip compiles, the first run takes minutes.
options=(--quiet --compile-bytecode --python .venv/bin/python)
if ! uv pip install "${options[@]}" --requirement requirements.txt "$@" > /dev/null 2>&1; then
    .venv/bin/python -m pip install --quiet --requirement requirements.txt "$@"
fi
.venv/bin/python - "$wanted" << 'CHECK' || exit 2
import importlib.metadata, re, sys
names = [re.match(r"([A-Za-z0-9][\w.-]*) *([=<>!~;@[]|$)", line) for line in sys.argv[1].split("\n")]
there = {re.sub(r"[-_.]+", "-", each.name).lower() for each in importlib.metadata.distributions()}
absent = [name[1] for name in names if name and re.sub(r"[-_.]+", "-", name[1]).lower() not in there]
if absent:
    sys.exit(f"error: pip ended well and did not install {', '.join(absent)}: see its settings (pip config list)")
CHECK
# Beside a CPU torch the registry's builds of these do not load, and transformers fails with them; text needs none.
for package in torchvision torchaudio; do
    if ! .venv/bin/python -c "import $package" > /dev/null 2>&1; then
        .venv/bin/python -m pip uninstall --quiet --yes "$package"
        say "left out $package: it was built for another torch"
    fi
done
echo "$wanted" > .venv/installed
say "installed the stack into .venv"
