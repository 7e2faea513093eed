#!/usr/bin/env bash
# Sets up .venv for detection and segmentation, on the CPU or for CUDA: bash install_dense.sh
# Installs requirements-dense.txt on top of requirements.txt, with mmcv's operators built for the torch in .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source .ci/environment.sh
source .ci/mmcv_wheel.sh
setup_environment
setup_dense_environment
