#!/usr/bin/env bash
# From nothing to a trained retrieval model on this machine alone: installs, harvests docstrings of the installed Python
# packages as data, pre-trains a small BERT from scratch (RetroMAE), fine-tunes it (contrastive), and prints one table.
#
#     ./launch/quickstart.sh [folder]      (default: quickstart)
#
# Uses the GPUs it finds, else two CPU processes. WITH_CONTROL=0 leaves out the fine-tuning without pre-training, which
# shows what pre-training gave. PRETRAIN_STEPS and FINETUNE_STEPS change the length. What lies in the folder already is not repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
look_at_machine

out=${1:-quickstart}
export HF_HUB_OFFLINE=1
# Texts a step over all ranks, and steps: what two CPU cores do in some minutes each.
pretrain_batch=$((ranks > 32 ? ranks : 32))
finetune_batch=$((ranks > 128 ? ranks : 128))
pretrain_steps=${PRETRAIN_STEPS:-300}
finetune_steps=${FINETUNE_STEPS:-150}
mkdir -p "$out"
begun=$SECONDS

headline() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - begun)); }
score() { # name, model, further flags of bge_ds.evaluate
    # Mean pooling throughout: from random weights the first token's vector says nothing for thousands of steps.
    [ -e "$out/scores/$1.json" ] || python -m bge_ds.evaluate --model_name_or_path "$2" --data "$out/data/test" \
        --query_max_len 32 --passage_max_len 64 --output "$out/scores/$1.json" "${@:3}" 2>/dev/null
}
train() { # module, where to, steps, texts a step, further flags
    deepspeed --num_gpus "$ranks" -m "bge_ds.$1" --output_dir "$2" --max_steps "$3" \
        --per_device_train_batch_size "$(($4 / ranks))" --learning_rate 1e-3 --lr_scheduler_type linear \
        --warmup_ratio 0.1 --logging_steps 5 --save_strategy no --overwrite_output_dir $precision "${@:5}"
}
contrastive() { # where to, what from
    [ -e "$1/model.safetensors" ] || train finetune "$1" "$finetune_steps" "$finetune_batch" \
        --model_name_or_path "$2" --train_data "$out/shards/train" --train_group_size 1 --negatives_cross_device \
        --query_max_len 32 --passage_max_len 64 --sentence_pooling_method mean --normlized True --temperature 0.05
}

headline "data: docstrings of the installed packages"
[ -e "$out/data/test/qrels.tsv" ] || python examples/harvest.py --output "$out/data"
[ -e "$out/small_bert/config.json" ] ||
    python examples/make_tokenizer.py --input "$out/data/pretrain.jsonl" --output "$out/small_bert"

headline "preprocessing to Arrow shards"
[ -e "$out/shards/pretrain/manifest.json" ] || python -m bge_ds.preprocess pretrain --input "$out/data/pretrain.jsonl" \
    --output "$out/shards/pretrain" --tokenizer "$out/small_bert" --max_seq_length 64
[ -e "$out/shards/train/manifest.json" ] || python -m bge_ds.preprocess finetune --input "$out/data/train.jsonl" \
    --output "$out/shards/train" --tokenizer "$out/small_bert" --query_max_len 32 --passage_max_len 64

headline "before: words alone, and the model with random weights"
[ -e "$out/scores/bag_of_words.json" ] ||
    python examples/bag_of_words.py --data "$out/data/test" --output "$out/scores/bag_of_words.json"
[ -e "$out/random/model.safetensors" ] ||
    python examples/random_model.py --config "$out/small_bert" --output "$out/random"
score random "$out/random" --sentence_pooling_method mean

headline "RetroMAE pre-training from scratch on $ranks ranks"
[ -e "$out/pretrain/encoder_model/model.safetensors" ] ||
    train pretrain "$out/pretrain" "$pretrain_steps" "$pretrain_batch" --model_name_or_path "" \
        --config_name "$out/small_bert" --tokenizer_name "$out/small_bert" --train_data "$out/shards/pretrain" \
        --max_seq_length 64
score pretrained "$out/pretrain/encoder_model" --sentence_pooling_method mean

headline "contrastive fine-tuning on $ranks ranks"
contrastive "$out/finetune" "$out/pretrain/encoder_model"
score finetuned "$out/finetune"

if [ "${WITH_CONTROL:-1}" != 0 ]; then
    headline "the same fine-tuning without pre-training"
    contrastive "$out/finetune_only" "$out/random"
    score finetuned_only "$out/finetune_only"
fi

headline "done"
python examples/plot_losses.py --output "$out/losses.png" "$out/pretrain/metrics.jsonl" "$out/finetune/metrics.jsonl"
python examples/score_table.py "bag of words (BM25)=$out/scores/bag_of_words.json" \
    "random weights=$out/scores/random.json" "RetroMAE pre-trained=$out/scores/pretrained.json" \
    "fine-tuned only=$out/scores/finetuned_only.json" "pre-trained and fine-tuned=$out/scores/finetuned.json"
