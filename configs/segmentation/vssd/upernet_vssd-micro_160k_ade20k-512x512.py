"""VSSD-Micro, UPerNet on crops of 512: mIoU 45.6, of several scales 46.0."""

_base_ = "./_base_512.py"
# the original's config is lost; the drop path is that of its detector
model = dict(
    backbone=dict(name="vssd_micro", drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
