"""Vim-B, Cascade Mask R-CNN: no AP published."""

_base_ = "./_base_100e.py"
# the original starts from a ViT-B of MAE, which does not fit
model = dict(backbone=dict(name="vim_base_patch16_224"), neck=dict(in_channels=768))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
