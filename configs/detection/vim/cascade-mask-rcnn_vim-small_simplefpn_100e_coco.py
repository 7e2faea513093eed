"""Vim-S, Cascade Mask R-CNN: no AP published."""

_base_ = "./_base_100e.py"
model = dict(backbone=dict(name="vim_small_patch16_224"), neck=dict(in_channels=384))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
