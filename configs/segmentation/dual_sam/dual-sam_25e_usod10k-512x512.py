"""Dual-SAM on USOD10K, in the folders that the data set comes in. Predictions were published, but no numbers."""

_base_ = "dual-sam_25e_mas3k-512x512.py"
data_root = "data/USOD10K"
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path="USOD10K-TR/USOD10K-TR-RGB", seg_map_path="USOD10K-TR/USOD10K-TR-GT"),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path="USOD10K-Val/USOD10K-Val-RGB", seg_map_path="USOD10K-Val/USOD10K-Val-GT"),
    )
)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path="USOD10K-TE/USOD10K-TE-RGB", seg_map_path="USOD10K-TE/USOD10K-TE-GT"),
    )
)
