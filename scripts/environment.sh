# Sourced by the shell scripts: the repository's own environment where it exists, else the python of the user's.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$repository/.venv/bin/python" ]; then
    PATH="$repository/.venv/bin:$PATH"
fi
export MPLBACKEND=agg # Jupyter names one of its own, which this python may lack

# run COMMAND …: ends as the command ends; Ctrl-C and SIGTERM reach it, so that no stage goes on without its script.
run() {
    "$@" &
    local child=$! status=0 stopped=0
    # A script's children in the background never see SIGINT, so both arrive as SIGTERM.
    trap 'stopped=130; kill -TERM "$child" 2> /dev/null' INT
    trap 'stopped=143; kill -TERM "$child" 2> /dev/null' TERM
    wait "$child" && status=0 || status=$?
    while kill -0 "$child" 2> /dev/null; do # a signal ends the wait, not the child
        wait "$child" && status=0 || status=$?
    done
    trap - INT TERM
    [ "$stopped" -eq 0 ] || status=$stopped
    return "$status"
}

# stage SCRIPT … ARGUMENT …: stages, with the same arguments, on all visible GPUs; NPROC=N asks for N processes.
stage() {
    local scripts=()
    while [[ ${1:-} == *.py ]]; do
        scripts+=("$repository/$1")
        shift
    done
    run python "$repository/scripts/launch.py" "${scripts[@]}" "$@"
}
