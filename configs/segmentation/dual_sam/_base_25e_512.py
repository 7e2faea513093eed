"""Data and schedule as published: 512 x 512 pixels without augmentation, 25 epochs with 5 images a step.

The original trains in the order of the files; here they are shuffled. Its rate of 0.01 is divided by ten before the
first epoch, so that 1e-3 is what it trains with, and again after 10 and 20 epochs.
"""

_base_ = "mmseg::_base_/default_runtime.py"
custom_imports = dict(
    imports=["segmentation.backbone", "segmentation.dual_sam.registration"], allow_failed_imports=False
)

crop_size = (512, 512)
# red, green and blue of the image, then of its gamma copy
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[124.55, 118.90, 102.94] * 2,
    std=[56.77, 55.97, 57.50] * 2,
    size=crop_size,
)
tta_model = dict(type="MaskTTAModel")
visualizer = dict(type="ConnectivityVisualizer")

data_root = "data/MAS3K"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="GammaCopy"),
    dict(type="LoadBinaryMask"),
    dict(type="Resize", scale=crop_size, keep_ratio=False),
    dict(type="PackSegInputs"),
]
# predictions are compared with masks of the original size
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="GammaCopy"),
    dict(type="Resize", scale=crop_size, keep_ratio=False),
    dict(type="LoadBinaryMask"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=5,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="MarineDataset",
        data_root=data_root,
        data_prefix=dict(img_path="train/Image", seg_map_path="train/Masks"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
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

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=25, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1))
param_scheduler = [dict(type="MultiStepLR", milestones=[10, 20], gamma=0.1, by_epoch=True)]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=True, interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
