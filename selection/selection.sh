#!/usr/bin/env bash
# Selection from end to end: speculative tuning (reused if done), scores, verification, coresets, and what it cost.
#     bash selection.sh [CONFIG] [--set key=value …]
# Without CONFIG: the demo, whose two models are made first. Uses all visible GPUs; NPROC=N asks for N processes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../scripts/environment.sh"

if [ $# -eq 0 ] || [[ $1 == --* ]]; then
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
