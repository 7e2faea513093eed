"""VSSD-Small, Mask R-CNN 1x: box AP 48.4, mask AP 43.5."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vssd_small", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
