"""VMamba-T v0, UPerNet on crops of 512: mIoU 47.3, of several scales 48.3."""

_base_ = "./_base_512.py"
# the original names no scan, and its default could not run any more; the drop path is what it inherited from Swin-T
model = dict(
    backbone=dict(name="vanilla_vmamba_tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
