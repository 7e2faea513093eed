"""Vim-B, UPerNet: no mIoU published."""

_base_ = "./_base_60k.py"
# no original config: as Vim-S, our choice
model = dict(
    backbone=dict(
        name="vim_base_patch16_224",
        model_args=dict(if_rope=True, if_rope_residual=True, use_residual_as_feature=True, last_layer_process="add"),
    ),
    decode_head=dict(in_channels=[768] * 4, channels=768),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.95))
