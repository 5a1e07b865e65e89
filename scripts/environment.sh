# Sourced by the shell scripts: the repository's own environment where it exists, else the python of the user's.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$repository/.venv/bin/python" ]; then
    PATH="$repository/.venv/bin:$PATH"
fi

# run COMMAND …: ends as the command ends; Ctrl-C and SIGTERM reach it, so that no stage goes on without its script.
run() {
    "$@" &
    local child=$! status=0
    trap 'kill -INT "$child" 2> /dev/null' INT
    trap 'kill -TERM "$child" 2> /dev/null' TERM
    while kill -0 "$child" 2> /dev/null; do
        wait "$child" && status=0 || status=$?
    done
    trap - INT TERM
    return "$status"
}

# stage SCRIPT …: a stage on all visible GPUs; NPROC=N asks for N processes.
stage() {
    run python "$repository/selection/launch.py" "$repository/$1" "${@:2}"
}
