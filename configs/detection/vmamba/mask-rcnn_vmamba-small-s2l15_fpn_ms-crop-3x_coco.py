"""VMamba-S (s2l15), Mask R-CNN 3x: box AP 49.9, mask AP 44.2."""

_base_ = "./_base_3x.py"
model = dict(
    backbone=dict(name="vmamba_small_s2l15", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
