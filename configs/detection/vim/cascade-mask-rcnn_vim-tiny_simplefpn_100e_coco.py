"""Vim-Ti, Cascade Mask R-CNN: box AP 45.7, mask AP 39.2."""

_base_ = "./_base_100e.py"
model = dict(backbone=dict(name="vim_tiny_patch16_224"), neck=dict(in_channels=192))
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
