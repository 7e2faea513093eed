"""VMamba-T (s1l8), Mask R-CNN 1x: box AP 47.3, mask AP 42.7."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
