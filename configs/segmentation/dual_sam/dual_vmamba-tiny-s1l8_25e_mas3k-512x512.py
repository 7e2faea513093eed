"""Dual-SAM's method on VMamba-T: all of it is trained, at a tenth of the decoders' rate.

Prompt, decoders, data and schedule are the same for every backbone of this folder with four maps, so that they can be
compared.
"""

_base_ = "_base_25e_512.py"
model = dict(
    type="DualSAM",
    data_preprocessor=_base_.data_preprocessor,
    size_divisor=32,
    backbone=dict(type="SSMBackbone", name="vmamba_tiny_s1l8", checkpoint=None, drop_path_rate=0.2),
    neck=dict(type="BottomNeck", in_channels=768),
    prompt=dict(type="CoupledPrompt", in_channels=[96, 192, 384, 768], dim=384, heads=(6, 6)),
    decode_head=dict(type="DualConnectivityHead", in_channels=[96, 192, 384, 768], doublings=[1, 1, 1, 1]),
    test_cfg=dict(mode="whole"),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
