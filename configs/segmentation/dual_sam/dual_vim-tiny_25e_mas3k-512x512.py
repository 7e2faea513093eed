"""Dual-SAM's method on Vim-Ti, whose four maps are made from one stride."""

_base_ = "dual_vmamba-tiny-s1l8_25e_mas3k-512x512.py"
model = dict(
    backbone=dict(name="vim_tiny_patch16_224", drop_path_rate=0.1, model_args=dict(img_size=512)),
    neck=dict(in_channels=192),
    prompt=dict(in_channels=[192, 192, 192, 192]),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
)
