"""VSSD-Small, UPerNet on crops of 512: no mIoU published."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vssd_small", drop_path_rate=0.4),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
