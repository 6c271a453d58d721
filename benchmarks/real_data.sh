#!/usr/bin/env bash
# What fine-tuning gives a real model on real data: the table of docs/benchmarks.md, in a quarter of an hour on two CPU cores.
#
#     ./benchmarks/real_data.sh DATA MODEL [OUT]      (default OUT: runs/real_data)
#
# DATA holds debian/train.jsonl.gz and the BEIR-form folders debian/dev and xquad_en; MODEL is the folder of all-MiniLM-L6-v2.
# Prints the table and draws OUT/report.png.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
data=$(cd "$1" && pwd) model=$2 out=${3:-runs/real_data}
make_environment
look_at_machine
export HF_HUB_OFFLINE=1

[ -e "$out/minilm/model.safetensors" ] || deepspeed --num_gpus "$ranks" -m bge_ds.finetune --output_dir "$out/minilm" \
    --overwrite_output_dir --model_name_or_path "$model" --train_data "$data/debian/train.jsonl.gz" --train_group_size 8 \
    --query_max_len 64 --passage_max_len 128 --per_device_train_batch_size "$((32 / ranks))" --max_steps 100 \
    --negatives_cross_device --bf16 --sentence_pooling_method mean --learning_rate 2e-5 --temperature 0.02 \
    --warmup_steps 10 --logging_steps 5 --save_strategy no
python examples/report.py --data "$data/debian/dev" "$data/xquad_en" --query_max_len 64 --passage_max_len 256 --bm25 0.25 \
    "before=$model" "fine-tuned=$out/minilm" --losses "$out/minilm" --picture "$out/report.png"
