"""UPerNet with vim_nano, whose four maps are pooled from one stride, on the embedded scenes of digits."""

_base_ = "upernet_vmamba-nano_digits.py"
model = dict(
    backbone=dict(name="vim_nano"),
    decode_head=dict(in_channels=[64, 64, 64, 64], in_index=[0, 1, 2, 3]),
    auxiliary_head=dict(in_channels=64),
)
