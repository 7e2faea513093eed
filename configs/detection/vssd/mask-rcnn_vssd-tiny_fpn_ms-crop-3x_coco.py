"""VSSD-Tiny, Mask R-CNN 3x: box AP 48.8, mask AP 43.6."""

_base_ = "./_base_3x.py"
model = dict(
    backbone=dict(name="vssd_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
