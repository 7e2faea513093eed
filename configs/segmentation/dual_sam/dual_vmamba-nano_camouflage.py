"""Dual-SAM's method on vmamba_nano and the embedded camouflaged digits: learns on two CPU cores in minutes."""

_base_ = "mmseg::_base_/default_runtime.py"
custom_imports = dict(
    imports=["segmentation.backbone", "segmentation.dual_sam.registration"], allow_failed_imports=False
)

crop_size = (128, 128)
# red, green and blue of the image, then of its gamma copy
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[124.55, 118.90, 102.94] * 2,
    std=[56.77, 55.97, 57.50] * 2,
    size=crop_size,
)
model = dict(
    type="DualSAM",
    data_preprocessor=data_preprocessor,
    size_divisor=16,
    backbone=dict(type="SSMBackbone", name="vmamba_nano", checkpoint=None, drop_path_rate=0.0),
    neck=dict(type="BottomNeck", in_channels=128, channels=64, doublings=1),
    prompt=dict(type="CoupledPrompt", in_channels=[32, 64, 128], dim=64, img_size=128, patch_size=16, heads=(4, 4)),
    decode_head=dict(
        type="DualConnectivityHead",
        in_channels=[32, 64, 128],
        doublings=[1, 1, 1],
        bottom_channels=64,
        channels=[16, 32, 64],
    ),
    test_cfg=dict(mode="whole"),
)
tta_model = dict(type="MaskTTAModel")
visualizer = dict(type="ConnectivityVisualizer")

data_root = "runs/data/camouflage/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="GammaCopy"),
    dict(type="LoadBinaryMask"),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=1.0),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="GammaCopy"),
    dict(type="LoadBinaryMask"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="MarineDataset",
        data_root=data_root,
        data_prefix=dict(img_path="train/Image", seg_map_path="train/Masks"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="MarineDataset",
        data_root=data_root,
        data_prefix=dict(img_path="test/Image", seg_map_path="test/Masks"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="MarineMetric")
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=400)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=50, end=2000, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=400, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
