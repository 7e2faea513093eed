"""VMamba-B v0, UPerNet on crops of 512: mIoU 50.0, of several scales 51.3."""

_base_ = "./_base_512.py"
# the original names no scan, and its default could not run any more; the drop path is what it inherited from Swin-T
model = dict(
    backbone=dict(name="vanilla_vmamba_base", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
