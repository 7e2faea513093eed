#!/usr/bin/env bash
# Train on several GPUs, or in several CPU processes: bash segmentation/tools/dist_train.sh CONFIG GPUS [flags of train.py]
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT on each. PYTHON is the interpreter (python).
set -euo pipefail
${PYTHON:-python} -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$2" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
