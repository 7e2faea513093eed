"""VMamba-B (s2l15), Mask R-CNN 1x: box AP 49.2, mask AP 44.1."""

_base_ = "./_base_1x.py"
model = dict(
    backbone=dict(name="vmamba_base_s2l15", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
