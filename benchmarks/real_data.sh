#!/usr/bin/env bash
# What training gives on real data: the figures of docs/benchmarks.md, in about an hour on two CPU cores.
#
#     ./benchmarks/real_data.sh DATA MODEL [OUT]      (default OUT: runs/real_data)
#
# DATA holds pretrain/train.jsonl.gz, debian/train.jsonl.gz and the BEIR-form folders debian/dev and xquad_en; MODEL is
# the folder of all-MiniLM-L6-v2. Writes OUT/scores/*.json, OUT/losses.png, and one table. Steps that are done are not repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
data=$(cd "$1" && pwd) model=$2 out=${3:-runs/real_data}
make_environment
look_at_machine
export HF_HUB_OFFLINE=1
mkdir -p "$out/scores"

finetune() { # name, model to start from, learning rate, temperature
    [ -e "$out/$1/model.safetensors" ] || deepspeed --num_gpus "$ranks" -m bge_ds.finetune --output_dir "$out/$1" \
        --overwrite_output_dir --model_name_or_path "$2" --train_data "$data/debian/train.jsonl.gz" --train_group_size 8 \
        --query_max_len 64 --passage_max_len 128 --per_device_train_batch_size "$((32 / ranks))" --max_steps 100 \
        --negatives_cross_device --bf16 --sentence_pooling_method mean --learning_rate "$3" --temperature "$4" \
        --warmup_steps 10 --logging_steps 5 --save_strategy no
}
score() { # name, model, passage length, further flags
    [ -e "$out/scores/$1.json" ] || python -m bge_ds.evaluate --model_name_or_path "$2" --data "$data/debian/dev" \
        "$data/xquad_en" --query_max_len 64 --passage_max_len "$3" --output "$out/scores/$1.json" "${@:4}"
}

finetune minilm "$model" 2e-5 0.02
score minilm_before "$model" 256
score minilm_after "$out/minilm" 256

if [ ! -e "$out/small/config.json" ]; then
    gunzip -c "$data/pretrain/train.jsonl.gz" > "$out/texts.jsonl"
    python examples/make_tokenizer.py --input "$out/texts.jsonl" --output "$out/small"
    rm "$out/texts.jsonl"
fi
[ -e "$out/random/model.safetensors" ] || python examples/random_model.py --config "$out/small" --output "$out/random"
[ -e "$out/pretrain/encoder_model/model.safetensors" ] || deepspeed --num_gpus "$ranks" -m bge_ds.pretrain \
    --output_dir "$out/pretrain" --overwrite_output_dir --model_name_or_path "" --config_name "$out/small" \
    --tokenizer_name "$out/small" --train_data "$data/pretrain/train.jsonl.gz" --max_seq_length 128 --bf16 \
    --per_device_train_batch_size "$((64 / ranks))" --max_steps 400 --learning_rate 1e-3 --warmup_steps 40 \
    --logging_steps 20 --save_strategy no
finetune pretrained_finetuned "$out/pretrain/encoder_model" 1e-3 0.05
finetune random_finetuned "$out/random" 1e-3 0.05
for name in random random_finetuned pretrained_finetuned; do
    score "small_$name" "$out/$name" 128 --sentence_pooling_method mean
done
score small_pretrained "$out/pretrain/encoder_model" 128 --sentence_pooling_method mean

python examples/plot_losses.py --output "$out/losses.png" "$out/pretrain/metrics.jsonl" "$out/minilm/metrics.jsonl" \
    "$out/random_finetuned/metrics.jsonl" "$out/pretrained_finetuned/metrics.jsonl"
rows=()
for name in minilm_before minilm_after small_random small_pretrained small_random_finetuned small_pretrained_finetuned; do
    rows+=("$name=$out/scores/$name.json")
done
python examples/score_table.py "${rows[@]}"
