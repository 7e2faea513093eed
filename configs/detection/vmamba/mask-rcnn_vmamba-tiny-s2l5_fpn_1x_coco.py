"""VMamba-T (s2l5), Mask R-CNN 1x: box AP 47.4, mask AP 42.7."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vmamba_tiny_s2l5", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
