"""VSSD-Tiny of ICCV 2025, Mask R-CNN 3x: no AP published."""

_base_ = "./_base_3x.py"
model = dict(
    backbone=dict(name="vssd_tiny_iccv2025", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
