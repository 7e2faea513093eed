"""VSSD-Base, Mask R-CNN 1x: no AP published."""

_base_ = "./_base_1x.py"
# no original config: the drop path is that of the classifier, our choice
model = dict(
    backbone=dict(name="vssd_base", drop_path_rate=0.6),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
