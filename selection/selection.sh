#!/usr/bin/env bash
# Selection from end to end: speculative tuning (reused if done), scores, verification, coresets, and what it cost.
#     bash selection.sh [CONFIG] [--set key=value …]
# Without CONFIG: the demo, whose two models are made first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../scripts/environment.sh"

if [ $# -eq 0 ] || [[ $1 == --* ]]; then
    config=$repository/configs/demo.yaml
    bash "$repository/scripts/demo_models.sh" "$@"
else
    config=$1
    shift
fi
python "$repository/finetune/finetune.py" --config_path "$config" "$@"
python "$here/effort_score.py" --config_path "$config" "$@"
python "$here/verify.py" --config_path "$config" "$@"
python "$here/coreset.py" --config_path "$config" "$@"
python "$here/costs.py" --config_path "$config" "$@"
