#!/usr/bin/env bash
# Evaluate on several GPUs, or in several CPU processes:
#   bash detection/tools/dist_test.sh CONFIG CHECKPOINT GPUS [--tta] [flags of test.py]
# Several machines: NNODES, NODE_RANK, MASTER_ADDR and PORT on each. PYTHON is the interpreter (python).
set -euo pipefail
${PYTHON:-python} -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$3" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
