"""VMamba-B v0, Mask R-CNN 1x: box AP 48.6, mask AP 43.3."""

_base_ = "./_base_1x.py"
# the original names no scan, and its default could not run any more; the drop path is what it inherited from Swin-T
# published with 16 GPUs of 1 image: the same batch
model = dict(
    backbone=dict(name="vanilla_vmamba_base", drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
