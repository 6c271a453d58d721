#!/usr/bin/env bash
# Part (a) of the quickstart with three seeds: does pre-training pay each time, on its own queries and in another domain?
#
#     ./benchmarks/quickstart.sh [OUT [BEIR_FOLDER ...]]     (default OUT: runs/quickstart; no further sets)
#
# Appends rows to benchmarks/quickstart.csv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/quickstart}
for seed in 1 2 3; do
    SEED=$seed PARTS=a ./launch/quickstart.sh "$out/$seed"
    .venv/bin/python examples/report.py "random weights, seed $seed=$out/$seed/random" \
        "fine-tuned only, seed $seed=$out/$seed/a_finetuned_only" \
        "pre-trained, seed $seed=$out/$seed/a_pretrained/encoder_model" \
        "pre-trained + fine-tuned, seed $seed=$out/$seed/a_finetuned" \
        --csv benchmarks/quickstart.csv --data "$out/$seed/data/test" "${@:2}"
done
