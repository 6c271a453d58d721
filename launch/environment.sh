# Sourced by the other scripts. Changes nothing by itself; $root is the repository.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Makes .venv in the repository where it is missing or out of date, and puts its programs first.
# PYTHON names the interpreter to build it with (default python3); pip's own variables (PIP_INDEX_URL ...) hold as usual.
make_environment() {
    local python=${PYTHON:-python3} wanted
    cd "$root"
    # What is installed: an interrupted install leaves no stamp and is done again.
    wanted=$(cat setup.py constraints.txt | cksum)
    if [ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: $python is no Python 3.10 or newer; name one, as in PYTHON=python3.12 $0" >&2
            return 1
        fi
        echo "== installing into $root/.venv"
        [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
        # torch before the rest: DeepSpeed's own set-up looks at the torch that is installed.
        .venv/bin/python -m pip install -q -c constraints.txt torch || return 1
        .venv/bin/python -m pip install -q -c constraints.txt -e '.[test]' || return 1
        echo "$wanted" > .venv/.installed
    fi
    export PATH="$root/.venv/bin:$PATH"
}

# For a launch in the user's own environment: takes the repository's .venv only where there is no deepspeed yet.
find_environment() {
    command -v deepspeed >/dev/null || export PATH="$root/.venv/bin:$PATH"
    command -v deepspeed >/dev/null || {
        echo "error: no deepspeed command; activate the environment that bge_ds is installed in" >&2
        return 1
    }
}

# The hostfile (HOSTFILE, else launch/hostfile) into $hostfile; refuses lines at which DeepSpeed would end with a traceback.
find_hostfile() {
    hostfile=${HOSTFILE:-$root/launch/hostfile}
    if [ ! -r "$hostfile" ]; then
        echo "error: no hostfile $hostfile; copy launch/hostfile, or name yours in HOSTFILE" >&2
        return 1
    fi
    if [[ $hostfile =~ [[:space:]] ]]; then
        echo "error: the hostfile's path '$hostfile' has a space, at which DeepSpeed's options would be split; name another in HOSTFILE" >&2
        return 1
    fi
    if grep -nvE '^[[:space:]]*(#.*)?$|^[[:space:]]*[^[:space:]#]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*(#.*)?$' "$hostfile" >&2; then
        echo "error: $hostfile: these lines are no host and its slots; valid is NAME slots=N, such as worker-1 slots=8" >&2
        return 1
    fi
}

# Sets ranks (NUM_GPUS, else one a GPU, else two), accelerated (True where there is a GPU), precision (bf16 where the GPU or
# CPU has instructions for it) and OMP_NUM_THREADS (so that all ranks together ask for no more cores than there are).
look_at_machine() {
    local facts
    facts=$(NUM_GPUS=${NUM_GPUS:-} python -c '
import os, torch
ranks = int(os.environ["NUM_GPUS"] or torch.cuda.device_count() or 2)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
# On a CPU without such instructions bfloat16 works, but slower than float32.
fast = any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
half = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else fast
print(ranks, max(1, cores // ranks), torch.cuda.is_available(), "--bf16" if half else "")
') || return 1
    read -r ranks threads accelerated precision <<< "$facts"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} TOKENIZERS_PARALLELISM=false
}
