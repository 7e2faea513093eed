"""Vim-S, UPerNet."""

_base_ = "./_base_60k.py"
model = dict(
    backbone=dict(
        name="vim_small_patch16_224",
        model_args=dict(if_rope=True, if_rope_residual=True, use_residual_as_feature=True, last_layer_process="add"),
    ),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.95))
