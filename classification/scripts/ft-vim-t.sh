#!/usr/bin/env bash
# Fine-tune Vim-Ti on overlapping patches as published on 8 GPUs, from weights that pt-vim-t.sh or the authors trained:
#   DATA_PATH=IMAGENET PRETRAINED=WEIGHTS classification/scripts/ft-vim-t.sh [OPTION of main.py ...]
if [[ -z ${PRETRAINED:-} ]]; then
    echo "error: PRETRAINED is not set: give the weights of Vim-Ti, vim_tiny_patch16_224.in1k, output/vim_tiny_patch16_224 or a file" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" vim/vim_tiny_patch16_stride8_224.yaml "$@"
