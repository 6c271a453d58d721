#!/usr/bin/env bash
# One virtual environment for each peer, with the same torch on every side: it is what all of them spend their time in.
#   benchmarks/make_environments.sh [FOLDER [NAME ...]]
# FOLDER: .bench in the repository by default. NAME: flagembedding, sentence_transformers, retromae, streaming; all of them
# by default. One that is complete is left as it is. PYTHON and TORCH, the version, may be set in the environment.
set -euo pipefail
folder=${1:-"$(dirname "$0")/../.bench"}
wanted=("${@:2}")
known=(flagembedding sentence_transformers retromae streaming)
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
transformers=transformers==5.23.0

listed() {  # a word, then the words it may be one of
    local word=$1 other
    shift
    for other in "$@"; do
        if [ "$word" = "$other" ]; then return 0; fi
    done
    return 1
}

for name in "${wanted[@]}"; do
    listed "$name" "${known[@]}" || { echo "error: no environment $name; there are: ${known[*]}" >&2; exit 2; }
done
mkdir -p "$folder"

environment() {  # name, then the packages; without those of `unused`, which the peer asks for and the benchmark does not run
    local name=$1 place="$folder/$1"
    shift
    if [ ${#wanted[@]} -gt 0 ] && ! listed "$name" "${wanted[@]}"; then return; fi
    if [ -e "$place/complete" ]; then
        echo "$place: there already"
        return
    fi
    "$python" -m venv --clear "$place"
    # torch first, by itself: installed together with the peer, the resolver is free to choose another one.
    "$place/bin/pip" install --quiet "torch==$torch"
    "$place/bin/pip" install --quiet "torch==$torch" "$@"
    if [ -n "${unused:-}" ]; then "$place/bin/pip" uninstall --quiet --yes "$unused"; fi
    "$place/bin/pip" freeze > "$place/complete"
    echo "$place: made"
}

environment flagembedding "$transformers" FlagEmbedding==1.4.2 faiss-cpu
environment sentence_transformers "$transformers" sentence-transformers==6.2.0 datasets accelerate
# A FlagEmbedding that has the RetroMAE command, and packages that it runs with.
environment retromae FlagEmbedding==1.2.11 transformers==4.44.2 accelerate==0.34.2 datasets==2.21.0 \
    sentence-transformers==5.0.0 peft==0.13.2
# Random reads. Its torch is the one above: left to itself, it would bring another with gigabytes of CUDA. torchvision is
# only for its images, and the one on PyPI cannot be imported beside a torch for CPUs: run_streaming.py does without.
unused=torchvision environment streaming mosaicml-streaming==0.13.0
