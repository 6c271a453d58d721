#!/usr/bin/env bash
# Fine-tuning on several hosts without ssh: this is started on every host, by whatever starts things there, with its number:
#
#     NODE_RANK=0 MASTER_ADDR=worker-1 ./launch/finetune_no_ssh.sh --output_dir /shared/run --train_data /shared/groups.jsonl
#     NODE_RANK=1 MASTER_ADDR=worker-1 ./launch/finetune_no_ssh.sh ... the same flags, on the second host of the hostfile
#
# HOSTFILE (launch/hostfile) lists the hosts and their slots in the order of their numbers, the same file everywhere; MASTER_ADDR
# is the first one's address, MASTER_PORT (29500) a free port there. All hosts start within --join_timeout seconds.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/environment.sh"
find_hostfile || exit 2
if [ -z "${MASTER_ADDR:-}" ] || ! [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]]; then
    echo "error: MASTER_ADDR (the first host's address) and NODE_RANK (this host's line in $hostfile, from 0) must be set" >&2
    exit 2
fi
hosts=$(grep -cE '^[[:space:]]*[^[:space:]#]' "$hostfile" || true)
if ((10#$NODE_RANK >= hosts)); then
    echo "error: NODE_RANK $NODE_RANK, and $hostfile has $hosts hosts, numbered from 0" >&2
    exit 2
fi
DEEPSPEED_ARGS="--hostfile $hostfile --no_ssh --node_rank $NODE_RANK"
DEEPSPEED_ARGS+=" --master_addr $MASTER_ADDR --master_port ${MASTER_PORT:-29500}"
export DEEPSPEED_ARGS
exec "$here/finetune.sh" "$@"
