"""Mask R-CNN with vssd_nano on the embedded scenes of digits."""

_base_ = "mask-rcnn_vmamba-nano_fpn_digits.py"
model = dict(backbone=dict(name="vssd_nano"))
