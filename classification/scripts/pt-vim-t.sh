#!/usr/bin/env bash
# Pretrain Vim-Ti as published, on 8 GPUs:  DATA_PATH=IMAGENET classification/scripts/pt-vim-t.sh [OPTION of main.py ...]
exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" vim/vim_tiny_patch16_224.yaml "$@"
