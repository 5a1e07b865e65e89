#!/usr/bin/env bash
# Selection from end to end: speculative tuning (reused if done), scores, suspect rows, verification, coresets, report.
#     bash selection.sh ../configs/demo.yaml          in selection/
#     bash selection.sh [--config_path] CONFIG [--dry_run] [--quiet] [--set key=value …]
#     bash selection.sh --target MODEL --data FILE … [--dry_run] [--quiet] [--set key=value …] [more: start.py --help]
# With --target, template and settings are found and said, and the mode is recommended: no small model is tuned; with
# --small, or --set selection.mode=paper, STAFF as published. Without both: the demo, whose two models are made first.
# Uses all visible GPUs; NPROC=N asks for N processes.
# Needs the models and the data that CONFIG names. Writes its run folder (output_dir), coresets/ in the end.
#     --dry_run          say what would be done, what is there, and what it would cost; nothing is written there
#     --quiet            say nothing but results, warnings and errors; default: what is done and reused, and costs
#     --set key=value    another value for a key of CONFIG; may be given again; default: none
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
refuse() {
    echo "error: $1 (--help says how to call this)" >&2
    exit 2
}
[[ " $* " =~ \ --(target|data)[\ =] ]] && start=yes || start=''
dry='' quiet=() configs=() others=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        --dry[_-]run) dry=--dry_run ;;
        --quiet) quiet=(--quiet) ;;
        --config[_-]path=*) configs+=("${1#*=}") ;;
        --config[_-]path | --set)
            [ "${2:-}" ] || refuse "$1 stands alone"
            [ "$1" = --set ] && others+=("$1" "$2") || configs+=("$2")
            shift ;;
        --set=*) others+=("$1") ;;
        *) # before anything is downloaded
            if [ "$start" ]; then
                others+=("$1")
            elif [[ $1 == -* ]]; then
                refuse "unknown argument $1"
            else
                configs+=("$1")
            fi ;;
    esac
    shift
done
[ ${#configs[@]} -lt 2 ] || refuse "more than one configuration: ${configs[*]}"
set -- "${quiet[@]}" "${others[@]}"
source "$here/../scripts/environment.sh"
scratch=$(mktemp -d)
trap 'wait; rm -rf "$scratch"' EXIT
next() { # a command to copy, for where the user stands
    printf 'next: python %q' "$(realpath --relative-to=. "$repository/$1")" >&2
    printf ' %q' "${@:2}" >&2
    echo >&2
}

if [ "$start" ]; then
    [ ${#configs[@]} -eq 0 ] || refuse "give --target and --data, or the configuration ${configs[0]}"
    run python "$here/start.py" --answer "$scratch/answer" "$@" ${dry:+"$dry"}
    mapfile -t answers < "$scratch/answer" # the experiment, then how to cut a small model where there is none
    config=${answers[0]}
    set -- "${quiet[@]}"
    if [ "$dry" ] && [ ${#answers[@]} -gt 1 ] && [ -d "${answers[-1]}" ]; then
        echo "the small model is there: ${answers[-1]}"
    elif [ "$dry" ] && [ ${#answers[@]} -gt 1 ]; then
        echo "would cut the small model out of the target first (scripts/make_draft.py): what follows is known then"
        exit
    elif [ ${#answers[@]} -gt 1 ]; then
        run python "$repository/scripts/make_draft.py" --config_path "$config" "${answers[@]:1}" "$@"
    fi
elif [ ${#configs[@]} -eq 0 ]; then
    config=$repository/configs/demo.yaml
    if [ "$dry" ] && [ ! -d "$repository/models/smollm2-135m-instruct-16-layers" ]; then
        echo "would make the demo's two models first (scripts/demo_models.sh): what follows is known then"
        exit
    fi
    [ "$dry" ] || run bash "$repository/scripts/demo_models.sh" "$@"
else
    config=${configs[0]}
fi
stages=(finetune/finetune.py selection/effort_score.py selection/verify.py selection/coreset.py)
if [ "$dry" ]; then
    NPROC=1 stage "${stages[@]}" --config_path "$config" "$@" --dry_run
    echo
    run python "$repository/scripts/plan.py" --config_path "$config" "$@"
    exit
fi
[ "${REPORT:-now}" = later ] || stages+=(scripts/costs.py scripts/report.py) # later: what runs after this makes both
mkfifo "$scratch/stdout"
tee -p "$scratch/printed" < "$scratch/stdout" &
tee=$!
stage "${stages[@]}" --config_path "$config" "$@" > "$scratch/stdout"
wait "$tee"
coreset=$(sed -n 's/.* at rate .* -> \(.*\.json\)$/\1/p' "$scratch/printed" | head -n 1)
if [ "${REPORT:-now}" = now ] && [ ${#quiet[@]} -eq 0 ] && [ "$coreset" ]; then
    next finetune/finetune-select.py --config_path "$config" "$@" --select_path "$coreset"
    next scripts/export.py "$(dirname "$(dirname "$coreset")")" --coreset "$(basename "$coreset" .json)"
fi
