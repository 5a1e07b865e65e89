#!/usr/bin/env bash
# The demo's two models: SmolLM2-135M-Instruct, and a speculator of 16 of its 30 layers. Reused if there.
#     bash scripts/demo_models.sh [--quiet] [--config_path CONFIG] [--set key=value …]
# The speculator is cut on CONFIG's training split into its small_model; default: configs/demo.yaml.
set -euo pipefail
for argument in "$@"; do
    case $argument in -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
target=$repository/models/smollm2-135m-instruct
quiet=() out=(--out "$target-16-layers") # the demo's, whatever small_model is set to
for argument in "$@"; do
    case $argument in
        --quiet) quiet=(--quiet) ;;
        --config[_-]path | --config[_-]path=*) out=() ;;
    esac
done
run python "$repository/scripts/prepare_model.py" --out "$target" "${quiet[@]}"
run python "$repository/scripts/make_draft.py" --config_path "$repository/configs/demo.yaml" \
    --target "$target" --layers 16 "${out[@]}" "$@"
