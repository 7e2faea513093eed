"""VMamba-T (s1l8), Mask R-CNN 3x: box AP 48.8, mask AP 43.7."""

_base_ = "./_base_3x.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s1l8", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
