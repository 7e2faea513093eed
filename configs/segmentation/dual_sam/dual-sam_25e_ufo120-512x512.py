"""Dual-SAM on UFO120. Published: mIoU 81.0, S-measure 85.6, weighted F 86.4, E-measure 91.4, MAE 6.4."""

_base_ = "dual-sam_25e_mas3k-512x512.py"
data_root = "data/UFO120"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
