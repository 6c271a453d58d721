#!/usr/bin/env bash
# Contrastive fine-tuning on several hosts, started from one of them. It needs pdsh there and, on every host, ssh
# without a password and the same environment and data at the same paths:
#
#     cp launch/hostfile my_hosts && $EDITOR my_hosts
#     cp launch/deepspeed_env.sample launch/.deepspeed_env && $EDITOR launch/.deepspeed_env
#     HOSTFILE=my_hosts ./launch/finetune_multinode.sh --output_dir /shared/run --train_data /shared/groups.jsonl
#
# launch/.deepspeed_env holds what every host's processes get in their environment: NAME=value lines and nothing else,
# since a blank or comment line crashes DeepSpeed's reader. Of your own variables DeepSpeed forwards only those whose
# names begin with PYTHON, NCCL, UCX, MV2 or MLFLOW; HF_*, WANDB_*, OMP_* must stand in the file. NCCL_SOCKET_IFNAME
# (GPUs) or GLOO_SOCKET_IFNAME (CPUs) names the network interface that the hosts reach one another by. PATH is the one
# of an ssh session: the offloading configurations need the environment's ninja, so PATH=/the/environment/bin:$PATH.
# MASTER_ADDR and MASTER_PORT choose where the processes meet (default: the first host's first address, port 29500).
# A port or key for ssh is best set in ~/.ssh/config. PDSH_SSH_ARGS_APPEND="-p 2222 -i key" works too, with MASTER_ADDR.
# A rank or host that fails ends the run on all hosts within a minute, with its name; one that does not start is named after
# --join_timeout seconds. Ctrl-C ends the run, and every other DeepSpeed run of yours with the same Python on these hosts.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
find_hostfile || exit 2
if [ -e "$here/.deepspeed_env" ]; then
    if grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' "$here/.deepspeed_env" >&2; then
        echo "error: launch/.deepspeed_env: these lines are no NAME=value; remove them (blank and comment lines too)" >&2
        exit 2
    fi
    export DS_ENV_FILE="$here/.deepspeed_env"
fi
# --force_multi: a hostfile of one host goes through pdsh as well.
DEEPSPEED_ARGS="--force_multi --hostfile $hostfile --master_port ${MASTER_PORT:-29500}"
DEEPSPEED_ARGS+="${MASTER_ADDR:+ --master_addr $MASTER_ADDR}"
if [ -n "${PDSH_SSH_ARGS_APPEND:-}" ]; then
    # Only pdsh knows these options; DeepSpeed's own two uses of ssh would fail without them.
    if [ -z "${MASTER_ADDR:-}" ]; then
        echo "error: PDSH_SSH_ARGS_APPEND needs MASTER_ADDR, the first host's address (or use ~/.ssh/config instead)" >&2
        exit 2
    fi
    DEEPSPEED_ARGS+=" --no_ssh_check"
fi
export DEEPSPEED_ARGS
# An ssh whose host is gone would wait for it for hours, and the whole launch with it.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=10"

# A shell on each host reads the flags again, and pdsh replaces %h, %n and %u. DeepSpeed puts only words with a space in
# (double) quotes, so what these leave open and all other words are quoted here.
words=()
for word in "$@"; do
    case $word in
        *" "*) word=$(printf %s. "$word" | sed 's/[\\$`]/\\&/g') && word=${word%.} ;;
        *) word="'${word//\'/\'\\\'\'}'" ;;
    esac
    words+=("${word//%/%%}")
done
exec "$here/finetune.sh" "${words[@]}"
