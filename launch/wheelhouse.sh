#!/usr/bin/env bash
# Wheels for machines without a network: ./launch/wheelhouse.sh FOLDER [PYTHON VERSION, such as 3.12]
#
# FOLDER gets what bge_ds needs beside torch and transformers and what those bring (numpy, tokenizers, safetensors, tqdm,
# filelock, packaging, PyYAML, triton, ...): DeepSpeed as a wheel of Python alone, which builds its own operations where it
# runs, and bge_ds itself. For x86-64 Linux, in the versions of constraints.txt. On the other machine:
#
#     python -m pip install --no-index --no-deps FOLDER/*.whl
#
# Left out for their size: pyarrow (45 MiB), which must be there or be asked for by WITH=pyarrow; datasets and what it brings,
# which only inputs other than JSON lines and shards need.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: $0 FOLDER [PYTHON VERSION, such as 3.12]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${PYTHON:-python3}
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
[[ $version =~ ^3\.[0-9]+$ ]] || { echo "error: '$version' is no version of Python; give it as 3.12" >&2; exit 2; }

# Wheels as they are on the index.
ready=(annotated-types bm25s einops ir-measures msgpack msgspec ninja orjson psutil py-cpuinfo pydantic pydantic-core pytrec-eval-terrier
       typing-inspection xxhash ${WITH:-})
# Source alone, of Python alone: built here.
to_build=(deepspeed hjson)

target=(--python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none)
for tag in 2_28 2_27 2_24 2_17 2_12 2_5; do target+=(--platform "manylinux_${tag}_x86_64"); done
target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 --platform any)

# Environment markers of constraints.txt are those of the Python that runs pip: only the versions of what is fetched matter.
"$python" -m pip download -q --no-deps --only-binary=:all: "${target[@]}" -c "$root/constraints.txt" -d "$folder" "${ready[@]}"
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps -c "$root/constraints.txt" -w "$folder" "${to_build[@]}"
"$python" -m pip wheel -q --no-deps -w "$folder" "$root"

echo "$(du -sm "$folder" | cut -f1) MiB in $folder for Python $version; on the other machine, which has torch and transformers:"
echo "    python -m pip install --no-index --no-deps $1/*.whl"
