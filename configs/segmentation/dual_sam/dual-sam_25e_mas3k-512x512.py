"""Dual-SAM with SAM's ViT-B on MAS3K. Published: mIoU 78.9, S-measure 88.4, weighted F 83.8, E-measure 93.3, MAE 2.3.

No weights were published; model.backbone.checkpoint names SAM's own (sam_vit_b_01ec64.pth).
"""

_base_ = "_base_25e_512.py"
model = dict(
    type="DualSAM",
    data_preprocessor=_base_.data_preprocessor,
    size_divisor=16,
    backbone=dict(type="SAMEncoder", checkpoint=None),
    prompt=dict(type="CoupledPrompt", in_channels=[768, 768, 768, 768]),
    decode_head=dict(type="DualConnectivityHead", in_channels=[768, 768, 768, 768], doublings=[3, 2, 1, 0]),
    test_cfg=dict(mode="whole"),
)
