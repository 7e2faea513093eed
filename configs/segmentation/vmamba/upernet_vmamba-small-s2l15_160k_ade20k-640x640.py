"""VMamba-S (s2l15), UPerNet on crops of 640: no mIoU published."""

_base_ = "./_base_640.py"
model = dict(
    backbone=dict(name="vmamba_small_s2l15", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
