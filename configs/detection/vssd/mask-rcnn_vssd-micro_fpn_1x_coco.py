"""VSSD-Micro, Mask R-CNN 1x: box AP 45.4, mask AP 41.3."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vssd_micro", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
