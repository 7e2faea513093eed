"""VMamba-S (s2l15), Mask R-CNN 1x: box AP 48.7, mask AP 43.7."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vmamba_small_s2l15", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
