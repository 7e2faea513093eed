"""VMamba-T (s2l5), UPerNet on crops of 512: mIoU 48.3, of several scales 48.6."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
