#!/usr/bin/env bash
# RetroMAE pre-training on this machine, one process a GPU:
#
#     ./launch/pretrain.sh --output_dir runs/pretrain --train_data texts.jsonl [further flags of bge_ds.pretrain]
#
# Flags given here come last and replace the ones below. NUM_GPUS limits the processes (default: all GPUs, else 2).
# DEEPSPEED_ARGS replaces the launcher's own options altogether (launch/finetune_multinode.sh shows a use).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_environment || exit 127
look_at_machine || exit 1

# The two unquoted variables hold several words, or none.
exec deepspeed ${DEEPSPEED_ARGS:---num_gpus $ranks} -m bge_ds.pretrain \
    --model_name_or_path bert-base-uncased \
    --learning_rate 2e-5 \
    --num_train_epochs 5 \
    --per_device_train_batch_size 32 \
    --max_seq_length 512 \
    --warmup_ratio 0.1 \
    $precision \
    "$@"
