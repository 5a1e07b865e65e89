# Sourced by the shell scripts: the repository's own environment where it exists, else the python of the user's.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$repository/.venv/bin/python" ]; then
    PATH="$repository/.venv/bin:$PATH"
fi
