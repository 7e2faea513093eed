"""Mask R-CNN with vim_nano, whose four maps are pooled from one stride, on the embedded scenes of digits."""

_base_ = "mask-rcnn_vmamba-nano_fpn_digits.py"
featmap_strides = [4, 8, 16, 32]
model = dict(
    backbone=dict(name="vim_nano"),
    neck=dict(in_channels=[64, 64, 64, 64]),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=featmap_strides),
        mask_roi_extractor=dict(featmap_strides=featmap_strides),
    ),
)
