"""Dual-SAM's method on VSSD-T."""

_base_ = "dual_vmamba-tiny-s1l8_25e_mas3k-512x512.py"
model = dict(
    backbone=dict(name="vssd_tiny"),
    neck=dict(in_channels=512),
    prompt=dict(in_channels=[64, 128, 256, 512]),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
