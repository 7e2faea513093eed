"""VMamba-T (s2l5), Mask R-CNN 3x: box AP 48.9, mask AP 43.7."""

_base_ = "./_base_3x.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
