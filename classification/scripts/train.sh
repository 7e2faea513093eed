#!/usr/bin/env bash
# Train a recipe on the GPUs of this machine, or continue where an earlier call was stopped.
#
#   DATA_PATH=IMAGENET [GPUS=8] [PRETRAINED=WEIGHTS] classification/scripts/train.sh CONFIG [OPTION of main.py ...]
#
# CONFIG is a yaml of configs/classification, e.g. vim/vim_tiny_patch16_224.yaml. The run folder is output/NAME OF CONFIG
# in the repository. GPUS is the number of processes, as many as there are GPUs if not given; rates follow the global
# batch: with fewer than the recipe's add --accumulation-steps to keep the published one. WEIGHTS are a file, a folder of
# a run or checkpoint, or a name that `python -m ssm_models` lists.
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
options=(--output output --tag "$(basename "$config" .yaml)" --resume auto)
weights=${PRETRAINED:-}
if [[ -e $weights || $weights == */* || $weights =~ \.(pth|pt|bin|safetensors)$ ]]; then
    weights=$(absolute PRETRAINED "$weights")
fi
if [[ -n $weights ]]; then options+=(--pretrained "$weights"); fi

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -f $config ]] || fail "$config does not exist"
command -v torchrun > /dev/null || PATH=$PWD/.venv/bin:$PATH
command -v torchrun > /dev/null || fail "torchrun is not there: bash quickstart.sh makes .venv, or activate another one"
gpus=${GPUS:-}
if [[ -z $gpus ]]; then
    python=$(dirname "$(command -v torchrun)")/python
    [[ -x $python ]] || fail "GPUS is not set, and there is no python beside torchrun that could count them: set GPUS"
    gpus=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')
    echo "GPUS is not set: $gpus process(es), for the GPUs of this machine" >&2
fi
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS is '$gpus', but it must be a number of GPUs, 1 or more"
exec torchrun --standalone --nproc_per_node="$gpus" classification/main.py \
    --cfg "$config" --data-path "$data" "${options[@]}" "$@"
