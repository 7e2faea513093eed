"""Vim-Ti, UPerNet: mIoU 41.0."""

_base_ = "./_base_60k.py"
# rate and weight decay of the base: the original's script sets them so, its config says 2e-4 and 0.1
model = dict(
    backbone=dict(name="vim_tiny_patch16_224", model_args=dict(residual_in_fp32=False)),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.92))
