#!/usr/bin/env bash
# Sets up .venv and runs the tests, several at a time: bash run_tests.sh [--fast] [--all] [pytest arguments]
#   --fast   only what needs no OpenMMLab packages
#   --all    also the tests that repeat at length what others hold in short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
source .ci/mmcv_wheel.sh

setup_environment
selection=()
if [ "${1:-}" = "--fast" ]; then
    selection=(-m "not dense")
    shift
else
    setup_dense_environment
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a thread for each of the processes: more would fight for the cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_REQUIRE_VIRTUALENV=1
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "${selection[@]}" "$@"
