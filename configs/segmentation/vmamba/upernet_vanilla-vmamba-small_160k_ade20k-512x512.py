"""VMamba-S v0, UPerNet on crops of 512: mIoU 49.5, of several scales 50.5."""

_base_ = "./_base_512.py"
# the original names no scan, and its default could not run any more; the drop path is what it inherited from Swin-T
model = dict(
    backbone=dict(name="vanilla_vmamba_small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
