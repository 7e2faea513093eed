"""VSSD-Small of ICCV 2025, UPerNet on crops of 512: no mIoU published."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vssd_small_iccv2025", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
