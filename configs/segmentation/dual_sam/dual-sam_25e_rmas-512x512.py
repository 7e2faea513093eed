"""Dual-SAM on RMAS. Published: mIoU 73.5, S-measure 86.0, weighted F 81.2, E-measure 94.4, MAE 2.2."""

_base_ = "dual-sam_25e_mas3k-512x512.py"
data_root = "data/RMAS"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
