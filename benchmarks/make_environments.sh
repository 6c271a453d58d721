#!/usr/bin/env bash
# One virtual environment for each peer, with the same torch on every side: it is what all of them spend their time in.
#   benchmarks/make_environments.sh [FOLDER]      (default: .bench in the repository; PYTHON and TORCH may be set)
set -euo pipefail
folder=${1:-"$(dirname "$0")/../.bench"}
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
transformers=transformers==5.23.0
mkdir -p "$folder"

environment() {  # name, then the packages
    local place="$folder/$1"
    shift
    if [ -e "$place/complete" ]; then
        echo "$place: there already"
        return
    fi
    "$python" -m venv --clear "$place"
    # torch first, by itself: installed together with the peer, the resolver is free to choose another one.
    "$place/bin/pip" install --quiet "torch==$torch"
    "$place/bin/pip" install --quiet "torch==$torch" "$@"
    "$place/bin/pip" freeze > "$place/complete"
    echo "$place: made"
}

environment flagembedding "$transformers" FlagEmbedding==1.4.2
environment sentence_transformers "$transformers" sentence-transformers==6.2.0 datasets accelerate
# A FlagEmbedding that has the RetroMAE command, and packages that it runs with.
environment retromae FlagEmbedding==1.2.11 transformers==4.44.2 accelerate==0.34.2 datasets==2.21.0 \
    sentence-transformers==5.0.0 peft==0.13.2
# Random reads. Its torch is the one above: left to itself, it would bring another with gigabytes of CUDA.
environment streaming mosaicml-streaming==0.13.0
