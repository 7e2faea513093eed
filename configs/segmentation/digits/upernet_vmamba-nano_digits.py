"""UPerNet with vmamba_nano on the embedded scenes of digits: learns on two CPU cores in minutes."""

_base_ = ["mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["segmentation.backbone"], allow_failed_imports=False)

# heads of a tenth of the usual cost
norm_cfg = dict(type="BN", requires_grad=True)
crop_size = (128, 128)
# nine of ten pixels are background: cross-entropy alone would long be content with that
losses = [
    dict(type="CrossEntropyLoss", loss_weight=1.0),
    dict(type="DiceLoss", use_sigmoid=False, ignore_index=0, loss_weight=1.0),
]
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type="SSMBackbone", name="vmamba_nano", checkpoint=None, drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[32, 64, 128],
        in_index=[0, 1, 2],
        channels=64,
        num_classes=11,
        norm_cfg=norm_cfg,
        loss_decode=losses,
        # with the usual deviation of 0.01 a short training stays with the background
        init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg")),
    ),
    auxiliary_head=dict(
        in_channels=64,
        in_index=1,
        channels=32,
        num_classes=11,
        norm_cfg=norm_cfg,
    ),
)

data_root = "runs/data/digit_scenes_ade/"
palette = [
    [40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
    [145, 30, 180], [70, 240, 240], [240, 50, 230], [170, 110, 40], [250, 190, 212],
]  # fmt: skip
metainfo = dict(classes=("background", *"0123456789"), palette=palette)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.8, 1.3), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=1.0),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
# no mirror images: digits have a handedness
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=ratio, keep_ratio=True) for ratio in (0.75, 1.0, 1.25)],
            [dict(type="LoadAnnotations", reduce_zero_label=True)],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        reduce_zero_label=True,
        img_suffix=".png",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        reduce_zero_label=True,
        img_suffix=".png",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=800, val_interval=200)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=100, end=800, by_epoch=False),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=200, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
