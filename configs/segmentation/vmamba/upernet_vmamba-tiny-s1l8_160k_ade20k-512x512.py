"""VMamba-T (s1l8), UPerNet on crops of 512: mIoU 47.9, of several scales 48.8."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
