#!/usr/bin/env bash
# The method on real weights and data: STAFF and Random at 20 % kept, tuned, and evaluated beside the untuned target.
#     bash scripts/demo.sh           SmolLM2-135M and biology question answering; about 10 minutes on 2 CPU cores
#     bash scripts/demo.sh --tiny    the same stages on a tiny random model, about a minute: it tests the plumbing
# A second call reuses what is there. Needs Python 3.11 to 3.13 with pip. RUN=folder puts the run elsewhere than runs/demo.
# Uses all visible GPUs; NPROC=N asks for N processes. --quiet: nothing but results, warnings and errors.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=demo quiet=()
for argument in "$@"; do
    case $argument in
        --tiny) name=tiny ;;
        --quiet) quiet=(--quiet) ;;
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        *) echo "error: unknown argument $argument: there are --tiny, --quiet and --help" >&2; exit 2 ;;
    esac
done

QUIET=${quiet[*]} bash "$scripts/setup.sh"
source "$scripts/environment.sh"
config=$repository/configs/$name.yaml
run=$(realpath -m "${RUN:-$repository/runs/$name}")
at=(--config_path "$config" --set "output_dir='$run'" "${quiet[@]}")
started=$SECONDS
if [ "$name" = tiny ]; then
    export OMP_NUM_THREADS=1 # more threads slow tiny models down
    run python "$scripts/make_tiny_model.py" --out "$repository/models/tiny" "${quiet[@]}"
    run python "$scripts/make_draft.py" "${at[@]}" \
        --target "$repository/models/tiny" --layers 2 --out "$repository/models/tiny-2-layers"
else
    run bash "$scripts/demo_models.sh" "${at[@]:2}"
fi
run python "$scripts/check_pool.py" "${at[@]}" --quiet
REPORT=later run bash "$repository/selection/selection.sh" "${at[@]:1}"
stage finetune/finetune-select.py "${at[@]}" --select_path "$run"/coresets/*-0.2.json
stage finetune/eval.py "${at[@]}" --tuned staff-0.2 random-0.2 untuned
run python "$scripts/costs.py" "${at[@]}" --tuned
[ "${quiet[*]}" ] || echo "demo: $((SECONDS - started)) s after the install" >&2
run python "$scripts/report.py" "${at[@]}"
