#!/usr/bin/env bash
# Train a recipe on the GPUs of this machine, or continue where an earlier call was stopped.
#
#   DATA_PATH=IMAGENET [GPUS=8] [PRETRAINED=WEIGHTS] classification/scripts/train.sh CONFIG [OPTION of main.py ...]
#
# CONFIG is a yaml of configs/classification, e.g. vim/vim_tiny_patch16_224.yaml. The run folder is output/NAME OF CONFIG
# in the repository. Rates follow the global batch: with fewer GPUs add --accumulation-steps to keep the published one.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

absolute() { # resolve here what the caller wrote there
    [[ -e $2 ]] || fail "$1 '$2' does not exist"
    echo "$(cd "$(dirname "$2")" && pwd)/$(basename "$2")"
}

[[ $# -gt 0 ]] || fail "no recipe given: DATA_PATH=IMAGENET [GPUS=8] [PRETRAINED=WEIGHTS] $0 CONFIG [OPTION ...]"
config=configs/classification/$1
shift
[[ -n ${DATA_PATH:-} ]] || fail "DATA_PATH is not set: give the folder of the images, which holds train and val"
data=$(absolute DATA_PATH "$DATA_PATH")
gpus=${GPUS:-8}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS is '$gpus', but it must be a number of GPUs, 1 or more"
options=(--output output --tag "$(basename "$config" .yaml)" --resume auto)
if [[ -n ${PRETRAINED:-} ]]; then
    options+=(--pretrained "$(absolute PRETRAINED "$PRETRAINED")")
fi
command -v torchrun > /dev/null || fail "torchrun is not on PATH: activate the environment (. .venv/bin/activate)"

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -f $config ]] || fail "$config does not exist"
exec torchrun --standalone --nproc_per_node="$gpus" classification/main.py \
    --cfg "$config" --data-path "$data" "${options[@]}" "$@"
