#!/usr/bin/env bash
# Sets up .venv and runs the tests: bash run_tests.sh [--fast] [pytest arguments]
#   --fast   only what needs no OpenMMLab packages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh

selection=()
if [ "${1:-}" = "--fast" ]; then
    selection=(-m "not dense")
    shift
fi

setup_environment
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "${selection[@]}" "$@"
