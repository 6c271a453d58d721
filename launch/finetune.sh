#!/usr/bin/env bash
# Contrastive fine-tuning on this machine, one process a GPU:
#
#     ./launch/finetune.sh --output_dir runs/finetune --train_data groups.jsonl [further flags of bge_ds.finetune]
#
# Flags given here come last and replace the ones below. NUM_GPUS limits the processes (default: all GPUs, else 2).
# DEEPSPEED_ARGS replaces the launcher's own options altogether (launch/finetune_multinode.sh shows a use).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_environment || exit 127
look_at_machine || exit 1

# The two unquoted variables hold several words, or none.
exec deepspeed ${DEEPSPEED_ARGS:---num_gpus $ranks} -m bge_ds.finetune \
    --model_name_or_path BAAI/bge-base-en-v1.5 \
    --learning_rate 1e-5 \
    --num_train_epochs 5 \
    --per_device_train_batch_size 32 \
    --train_group_size 8 \
    --query_max_len 32 \
    --passage_max_len 128 \
    --normlized True \
    --temperature 0.01 \
    --negatives_cross_device \
    $precision \
    "$@"
