"""VSSD-Small, Mask R-CNN 3x: box AP 50.0, mask AP 44.6."""

_base_ = "./_base_3x.py"
# the original's config is lost; this is its 1x with the 3x schedule
model = dict(
    backbone=dict(name="vssd_small", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
