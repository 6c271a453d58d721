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
# (GPUs) or GLOO_SOCKET_IFNAME (CPUs) names the network interface that the hosts reach one another by.
# ssh's options go through PDSH_SSH_ARGS_APPEND, as in PDSH_SSH_ARGS_APPEND="-p 2222 -i key". MASTER_ADDR and
# MASTER_PORT choose where the processes meet. Should a host fail while starting, the others wait without a word until
# DEEPSPEED_TIMEOUT (minutes): look at the first host's lines for the error.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hostfile=${HOSTFILE:-$here/hostfile}
if [ ! -r "$hostfile" ]; then
    echo "error: no hostfile $hostfile; copy launch/hostfile, or name yours in HOSTFILE" >&2
    exit 2
fi
if [ -e "$here/.deepspeed_env" ]; then
    if grep -nvE '^[A-Za-z_][A-Za-z0-9_]*=' "$here/.deepspeed_env" >&2; then
        echo "error: launch/.deepspeed_env: these lines are no NAME=value; remove them (blank and comment lines too)" >&2
        exit 2
    fi
    export DS_ENV_FILE="$here/.deepspeed_env"
fi
DEEPSPEED_ARGS="--hostfile $hostfile --master_port ${MASTER_PORT:-29500}"
export DEEPSPEED_ARGS+="${MASTER_ADDR:+ --master_addr $MASTER_ADDR}"
exec "$here/finetune.sh" "$@"
