#!/usr/bin/env bash
# All that is to be measured on one GPU, in at most 8 minutes: benchmarks/gpu.sh OUT --wheels FOLDER --data FOLDER [--dry-run]
#
# Needs no network. FOLDER of --wheels is made by launch/wheelhouse.sh, that of --data by gpu_sample.py. OUT gets gpu.csv,
# a row as soon as it is measured, a log of each part and profile.txt. A part that fails or takes too long leaves a row that
# says so, and the next begins. With --dry-run: toy shapes on the CPU, to see that everything runs. PARTS="..." takes some.
#
#   tests                   tests/gpu
#   rates                   the card's matrix and memory rate, which others are shares of (each part measures it again: 1 s)
#   large                   fine-tuning at bge-large's shape against the padded loop
#   kernels                 decoder attention, cross entropy over the vocabulary, contrastive loss
#   retromae                pre-training at three shapes against the padded one
#   sentence_transformers   fine-tuning at two shapes against it, whole and in pieces
#   command                 both commands themselves, on real texts
#   profile                 kernels of a step, idle share
#   pieces                  8,192 queries in pieces
#   others                  fine-tuning at three more shapes
#   no_dropout              fine-tuning without dropout
#   compiled                fine-tuning with --torch_compile against without
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels='' data='' dry=()
out=${1:?usage: $0 OUT --wheels FOLDER --data FOLDER [--dry-run]}
shift
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        --data) data=${2:?--data needs a folder}; shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        *) echo "error: '$1' is unknown; valid are --wheels FOLDER, --data FOLDER, --dry-run" >&2; exit 2 ;;
    esac
done
[ -f "$data/lengths.json" ] || { echo "error: --data '$data' has no lengths.json; make it by benchmarks/gpu_sample.py" >&2; exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd)
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
    rm -rf "$site"/bge_ds*  # the checkout's own is measured
    export PYTHONPATH=$root:$site
else
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
cd "$root"
# Seconds that each part may take: together 480.
declare -A seconds=(
    [tests]=105 [rates]=10 [large]=45 [kernels]=45 [retromae]=45 [sentence_transformers]=45 [command]=50 [profile]=20
    [pieces]=40 [others]=30 [no_dropout]=15 [compiled]=30
)
for part in ${PARTS:-tests rates large kernels retromae sentence_transformers command profile pieces others no_dropout compiled}; do
    limit=${seconds[$part]:-20}
    [ ${#dry[@]} -gt 0 ] && limit=120
    echo "== $part, at most $limit s"
    if [ "$part" = tests ]; then
        timeout -k 5 "$limit" python3 -m pytest tests/gpu -q -p no:cacheprovider --durations=5 > "$out/tests.log" 2>&1
    else
        timeout -k 5 "$limit" python3 benchmarks/own_gpu.py "$part" "$out/gpu.csv" --data "$data" "${dry[@]}" \
            >> "$out/parts.log" 2>&1
    fi
    status=$?
    if [ $status -ne 0 ]; then
        [ $status -eq 124 ] && why="took more than $limit s" || why="ended with status $status"
        echo "   failed: $why"
        [ -f "$out/gpu.csv" ] && echo "$(date +%F),,,$part,bge_ds,,,,,,,,,failed: $why" >> "$out/gpu.csv"
    fi
done
[ -f "$out/tests.log" ] && tail -n 1 "$out/tests.log"
cat "$out/gpu.csv"
