"""VSSD-Base, UPerNet on crops of 512: no mIoU published."""

_base_ = "./_base_512.py"
# no original config: the drop path is that of the classifier, our choice
model = dict(
    backbone=dict(name="vssd_base", drop_path_rate=0.6),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
