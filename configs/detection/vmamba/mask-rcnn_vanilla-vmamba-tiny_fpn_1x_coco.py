"""VMamba-T v0, Mask R-CNN 1x: box AP 46.5, mask AP 42.1."""

_base_ = "./_base_1x.py"
# the original names no scan, and its default could not run any more; the drop path is what it inherited from Swin-T
model = dict(
    backbone=dict(name="vanilla_vmamba_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
