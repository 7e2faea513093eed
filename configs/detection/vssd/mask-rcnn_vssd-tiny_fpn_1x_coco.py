"""VSSD-Tiny, Mask R-CNN 1x: box AP 46.9, mask AP 42.6."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vssd_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
