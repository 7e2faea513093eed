#!/usr/bin/env bash
# Every published result, and the command that gives it.
#
#   bash modelcard.sh --list                         names, published numbers, and where the authors' weights are
#   CKPT=FILE bash modelcard.sh NAME                 evaluate the weights in FILE: top-1, AP or mIoU
#   CKPT=FILE bash modelcard.sh NAME tta             the same with test-time augmentation: mIoU of several scales
#   CKPT=FILE bash modelcard.sh NAME train           train; a detector or segmentor starts from a classifier's FILE
#   bash modelcard.sh [NAME [ACTION]] --dry-run      print the command and do nothing; without NAME, all commands
#
# NAME is that of a config, and what follows goes to the tool. GPUS (8) is the number of processes. Images: DATA_PATH
# (data/imagenet) for classification; data/coco and data/ade/ADEChallengeData2016, or --data-root DIR, else.
set -euo pipefail

# name | published | weights of the authors
models() {
    cat << 'TABLE'
vanilla_vmamba_tiny | top-1 82.2 | VMamba releases, #v0cls/vssmtiny_dp01_ckpt_epoch_292.pth
vanilla_vmamba_small | top-1 83.5 | VMamba releases, #v0cls/vssmsmall_dp03_ckpt_epoch_238.pth
vanilla_vmamba_base | top-1 83.7 | VMamba releases, #v0cls/vssmbase_dp06_ckpt_epoch_241.pth
vmamba_tiny_s2l5 | top-1 82.5 | VMamba releases, #v2cls/vssm_tiny_0230_ckpt_epoch_262.pth
vmamba_small_s2l15 | top-1 83.6 | VMamba releases, #v2cls/vssm_small_0229_ckpt_epoch_222.pth
vmamba_base_s2l15 | top-1 83.9 | VMamba releases, #v2cls/vssm_base_0229_ckpt_epoch_237.pth
vmamba_tiny_s1l8 | top-1 82.6 | VMamba releases, #v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth
vmamba_small_s1l20 | top-1 83.3 | VMamba releases, #v2cls/vssm1_small_0229s_ckpt_epoch_240.pth
vmamba_base_s1l20 | top-1 83.8 | VMamba releases, #v2cls/vssm1_base_0229s_ckpt_epoch_225.pth
vim_tiny_patch16_224 | top-1 76.1 | Hugging Face, hustvl/Vim-tiny-midclstok
vim_tiny_patch16_stride8_224 | top-1 78.3 | Hugging Face, hustvl/Vim-tiny-midclstok
vim_small_patch16_224 | top-1 80.5 | Hugging Face, hustvl/Vim-small-midclstok
vim_small_patch16_stride8_224 | top-1 81.6 | Hugging Face, hustvl/Vim-small-midclstok
vim_base_patch16_224 | top-1 81.9 | Hugging Face, hustvl/Vim-base-midclstok
vssd_micro | top-1 82.5 | Hugging Face, YuhengSSS/VSSD, vssd_micro_best.pth
vssd_tiny | top-1 83.6 | Hugging Face, YuhengSSS/VSSD, vssd_tiny_best_ema.pth
vssd_small | top-1 84.1 | Hugging Face, YuhengSSS/VSSD, vssd_small_best_ema.pth
vssd_base | top-1 84.7 | Hugging Face, YuhengSSS/VSSD, vssd_base_best_ema.pth
vssd_tiny_mesa | top-1 84.1 | Hugging Face, YuhengSSS/VSSD, vssd_tiny_e300_with_mesa.pth
vssd_small_mesa | top-1 84.5 | Hugging Face, YuhengSSS/VSSD
vssd_base_mesa | top-1 85.4 | Hugging Face, YuhengSSS/VSSD, vssd_base_e300_with_mesa.pth
mask-rcnn_vanilla-vmamba-tiny_fpn_1x_coco | AP 46.5 / 42.1 | VMamba releases, #v0det/vssmtiny_mask_rcnn_swin_fpn_coco_epoch_12.pth
mask-rcnn_vanilla-vmamba-tiny_fpn_ms-crop-3x_coco | AP 48.5 / 43.2 | VMamba releases, #v0det/vssmtiny_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth
mask-rcnn_vanilla-vmamba-small_fpn_1x_coco | AP 48.2 / 43.0 | VMamba releases, #v0det/vssmsmall_mask_rcnn_swin_fpn_coco_epoch_12.pth
mask-rcnn_vanilla-vmamba-small_fpn_ms-crop-3x_coco | AP 49.7 / 44.0 | VMamba releases, #v0det/vssmsmall_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth
mask-rcnn_vanilla-vmamba-base_fpn_1x_coco | AP 48.6 / 43.3 | VMamba releases, #v0det/vssmbase_mask_rcnn_swin_fpn_coco_epoch_12.pth
mask-rcnn_vmamba-tiny-s2l5_fpn_1x_coco | AP 47.4 / 42.7 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth
mask-rcnn_vmamba-tiny-s2l5_fpn_ms-crop-3x_coco | AP 48.9 / 43.7 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth
mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco | AP 47.3 / 42.7 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth
mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco | AP 48.8 / 43.7 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth
mask-rcnn_vmamba-small-s2l15_fpn_1x_coco | AP 48.7 / 43.7 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth
mask-rcnn_vmamba-small-s2l15_fpn_ms-crop-3x_coco | AP 49.9 / 44.2 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth
mask-rcnn_vmamba-base-s2l15_fpn_1x_coco | AP 49.2 / 44.1 | VMamba releases, #v2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth
mask-rcnn_vssd-micro_fpn_1x_coco | AP 45.4 / 41.3 | Hugging Face, YuhengSSS/VSSD
mask-rcnn_vssd-micro_fpn_ms-crop-3x_coco | AP 47.7 / 42.8 | Hugging Face, YuhengSSS/VSSD
mask-rcnn_vssd-tiny_fpn_1x_coco | AP 46.9 / 42.6 | Hugging Face, YuhengSSS/VSSD
mask-rcnn_vssd-tiny_fpn_ms-crop-3x_coco | AP 48.8 / 43.6 | Hugging Face, YuhengSSS/VSSD
mask-rcnn_vssd-small_fpn_1x_coco | AP 48.4 / 43.5 | Hugging Face, YuhengSSS/VSSD
mask-rcnn_vssd-small_fpn_ms-crop-3x_coco | AP 50.0 / 44.6 | Hugging Face, YuhengSSS/VSSD
cascade-mask-rcnn_vim-tiny_simplefpn_100e_coco | AP 45.7 / 39.2 | not published
upernet_vanilla-vmamba-tiny_160k_ade20k-512x512 | mIoU 47.3, tta 48.3 | VMamba releases, #v0seg/vssmtiny_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth
upernet_vanilla-vmamba-small_160k_ade20k-512x512 | mIoU 49.5, tta 50.5 | VMamba releases, #v0seg/vssmsmall_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth
upernet_vanilla-vmamba-small_160k_ade20k-640x640 | mIoU 50.8 | not published
upernet_vanilla-vmamba-base_160k_ade20k-512x512 | mIoU 50.0, tta 51.3 | VMamba releases, #v0seg/vssmbase_upernet_4xb4-160k_ade20k-512x512_iter_128000.pth
upernet_vmamba-tiny-s2l5_160k_ade20k-512x512 | mIoU 48.3, tta 48.6 | VMamba releases, #v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_iter_160000.pth
upernet_vmamba-tiny-s1l8_160k_ade20k-512x512 | mIoU 47.9, tta 48.8 | VMamba releases, #v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth
upernet_vmamba-small-s2l15_160k_ade20k-512x512 | mIoU 50.6, tta 51.2 | VMamba releases, #v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth
upernet_vmamba-base-s2l15_160k_ade20k-512x512 | mIoU 51.0, tta 51.6 | VMamba releases, #v2seg/upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth
upernet_vssd-micro_160k_ade20k-512x512 | mIoU 45.6, tta 46.0 | Hugging Face, YuhengSSS/VSSD
upernet_vssd-tiny_160k_ade20k-512x512 | mIoU 47.9, tta 48.7 | Hugging Face, YuhengSSS/VSSD
upernet_vim-tiny_60k_ade20k-512x512 | mIoU 41.0 | not published
TABLE
}

fail() {
    echo "error: $1" >&2
    exit 2
}

is_classifier() {
    [[ $name != *-* ]]
}

# set `command` for $name and $action
build_command() {
    local configs=(configs/*/*/"$name".yaml configs/*/*/"$name".py) found=()
    for config in "${configs[@]}"; do
        if [[ -f $config ]]; then found+=("$config"); fi
    done
    [[ ${#found[@]} == 1 ]] || fail "$name has ${#found[@]} configs below configs/ instead of one"
    local config=${found[0]} task
    task=$(cut -d/ -f2 <<< "$config")
    case $task-$action in
        classification-test)
            command=(torchrun --standalone --nproc_per_node="$gpus" classification/main.py --cfg "$config"
                --data-path "$data" --output output --tag "$name-test" --eval --pretrained "$weights") ;;
        classification-train)
            command=(env "DATA_PATH=$data" "GPUS=$gpus")
            # without, a classifier begins with random weights
            if [[ -n ${CKPT:-} || $name == *stride8* ]]; then command+=("PRETRAINED=$weights"); fi
            command+=(classification/scripts/train.sh "${config#configs/classification/}") ;;
        *-test) command=(bash "$task/tools/dist_test.sh" "$config" "$weights" "$gpus") ;;
        *-tta) command=(bash "$task/tools/dist_test.sh" "$config" "$weights" "$gpus" --tta) ;;
        *-train)
            # --cfg-options would take them for lists, or leave them out
            [[ ! $weights =~ [][\(\)\'\",\ ] ]] || fail "CKPT '$weights' may hold no space, comma, bracket or quote here"
            command=(bash "$task/tools/dist_train.sh" "$config" "$gpus"
                --cfg-options "model.backbone.checkpoint=$weights") ;;
    esac
}

dry=false name="" action="" options=()
for word in "$@"; do
    case $word in
        --dry-run) dry=true ;;
        --list) name=--list ;;
        *) if [[ -z $name ]]; then name=$word
           elif [[ -z $action && ${#options[@]} == 0 && $word != -* ]]; then action=$word
           else options+=("$word"); fi ;;
    esac
done

if [[ $name == --list ]]; then
    models | sed 's/ | /|/g' | awk -F'|' '{ printf "%-52s %-20s %s\n", $1, $2, $3 }'
    exit
fi
gpus=${GPUS:-8}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS is '$gpus', but it must be a number of processes, 1 or more"
weights=${CKPT:-} data=${DATA_PATH:-}
# files are meant from where the caller is
if [[ -n $weights && $weights != /* ]]; then weights=$PWD/$weights; fi
if [[ -n $data && $data != /* ]]; then data=$PWD/$data; fi
data=${data:-data/imagenet}
cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH=$PWD/.venv/bin:$PATH

if [[ -z $name ]]; then
    $dry || fail "no name given: bash modelcard.sh --list shows them"
    weights=${weights:-WEIGHTS}
    while IFS='|' read -r name _; do
        name=${name% }
        for action in test tta train; do
            if [[ $action == tta ]] && is_classifier; then continue; fi
            build_command
            printf '%q ' "${command[@]}"
            echo
        done
    done < <(models)
    exit
fi

row=$(models | awk -F' [|] ' -v name="$name" '$1 == name')
[[ -n $row ]] || fail "$name is not in the list: bash modelcard.sh --list"
action=${action:-test}
[[ $action =~ ^(test|tta|train)$ ]] || fail "'$action' is not one of test, tta, train"
if [[ $action == tta ]] && is_classifier; then fail "$name is a classifier: it has test and train"; fi
if $dry; then
    weights=${weights:-WEIGHTS}
elif [[ -z $weights ]]; then
    # a classifier is trained from random weights, except on overlapping patches
    { [[ $action == train && $name != *stride8* ]] && is_classifier; } ||
        fail "CKPT is not set: give the file of the weights (of the authors: ${row##*| }; train: the classifier's)"
else
    [[ -e $weights ]] || fail "CKPT $weights does not exist"
fi
build_command
command+=(${options[@]+"${options[@]}"})
if $dry; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
