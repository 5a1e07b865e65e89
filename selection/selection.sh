#!/usr/bin/env bash
# Selection from end to end: speculative tuning (reused if done), scores, verification, coresets, and what it cost.
#     bash selection.sh [CONFIG] [--set key=value …]
#     bash selection.sh --target MODEL --data FILE [more: see start.py --help]
# The second form finds small model, template and settings by itself. Without CONFIG and --target: the demo, whose two
# models are made first. Uses all visible GPUs; NPROC=N asks for N processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../scripts/environment.sh"

if [[ " $* " == *" --target"* || " $* " == *" --data"* ]]; then
    answer=$(mktemp)
    trap 'rm -f "$answer"' EXIT
    run python "$here/start.py" --answer "$answer" "$@"
    mapfile -t answers < "$answer" # the experiment, then how to cut a small model where there is none
    config=${answers[0]}
    set --
    if [ ${#answers[@]} -gt 1 ]; then
        run python "$repository/scripts/make_draft.py" --config_path "$config" "${answers[@]:1}"
    fi
elif [ $# -eq 0 ] || [[ $1 == --* ]]; then
    config=$repository/configs/demo.yaml
    run bash "$repository/scripts/demo_models.sh" "$@"
else
    config=$1
    shift
fi
stage finetune/finetune.py --config_path "$config" "$@"
stage selection/effort_score.py --config_path "$config" "$@"
stage selection/verify.py --config_path "$config" "$@"
run python "$here/coreset.py" --config_path "$config" "$@"
run python "$here/costs.py" --config_path "$config" "$@"
