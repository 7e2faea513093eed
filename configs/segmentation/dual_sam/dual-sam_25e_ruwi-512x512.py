"""Dual-SAM on RUWI. Published: mIoU 90.4, S-measure 90.3, weighted F 93.9, E-measure 95.9, MAE 3.5."""

_base_ = "dual-sam_25e_mas3k-512x512.py"
data_root = "data/RUWI"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
