"""VMamba-B (s2l15), UPerNet on crops of 512: mIoU 51.0, of several scales 51.6."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vmamba_base_s2l15", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
