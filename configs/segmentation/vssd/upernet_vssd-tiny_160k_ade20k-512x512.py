"""VSSD-Tiny, UPerNet on crops of 512: mIoU 47.9, of several scales 48.7."""

_base_ = "./_base_512.py"
model = dict(
    backbone=dict(name="vssd_tiny", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
