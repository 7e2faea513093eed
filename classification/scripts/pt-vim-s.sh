#!/usr/bin/env bash
# Pretrain Vim-S as published, on 8 GPUs:  DATA_PATH=IMAGENET classification/scripts/pt-vim-s.sh [OPTION of main.py ...]
exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" vim/vim_small_patch16_224.yaml "$@"
