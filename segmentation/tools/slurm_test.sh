#!/usr/bin/env bash
# Evaluate under Slurm: bash segmentation/tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [flags of test.py]
# GPUS in all (4), GPUS_PER_NODE (4), CPUS_PER_TASK (5), SRUN_ARGS, PYTHON (python).
set -euo pipefail
gpus=${GPUS:-4} per_node=${GPUS_PER_NODE:-4}
# shellcheck disable=SC2086
srun --partition="$1" --job-name="$2" --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    ${PYTHON:-python} -u "$(dirname "$0")/test.py" "$3" "$4" --launcher slurm "${@:5}"
