# Sourced by the shell scripts: the Python to use, an active environment before the repository's own.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$repository/.venv/bin/python" ]; then
    PATH="$repository/.venv/bin:$PATH"
fi
