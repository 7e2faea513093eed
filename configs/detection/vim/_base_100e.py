"""Cascade Mask R-CNN of plain backbones by the recipe of ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527), in
mmdet's terms: 1024x1024 pixels, large-scale jitter, mixed precision, 184375 steps of 64 images (100 epochs), 8 GPUs.

The original trains with Detectron2. Two things stay as mmdet has them: losses of the cascade weigh 1, 1/2 and 1/4,
where Detectron2 scales their gradients by 1/3; and there are masks of all three stages, not of the last alone.
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "mmdet::common/lsj-100e_coco-instance.py"]
custom_imports = dict(imports=["detection.backbone"], allow_failed_imports=False)

norm_cfg = dict(type="LN2d", eps=1e-6)
# deviations of the regression targets of the three heads, x and y before width and height
deviations = [(1 / 10, 1 / 5), (1 / 20, 1 / 10), (1 / 30, 1 / 15)]
model = dict(
    # every image becomes 1024x1024, padded by 0 after normalisation
    data_preprocessor=dict(pad_size_divisor=1024),
    backbone=dict(
        _delete_=True,
        type="SSMBackbone",
        checkpoint=None,
        drop_path_rate=0.1,
        out_indices=[23],
        # rotated positions as published, in spite of weights that were trained without
        model_args=dict(
            img_size=1024,
            if_fpn=False,
            use_residual_as_feature=True,
            last_layer_process="add",
            if_rope=True,
            if_rope_residual=True,
        ),
    ),
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2, loss_bbox=dict(_delete_=True, type="L1Loss", loss_weight=1.0)),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=norm_cfg,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=(0.0, 0.0, 0.0, 0.0),
                    target_stds=(centre, centre, side, side),
                ),
                reg_class_agnostic=True,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="L1Loss", loss_weight=1.0),
            )
            for centre, side in deviations
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
    train_cfg=dict(rpn_proposal=dict(max_per_img=1000)),
)

test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=(1024, 1024), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
    # steps are counted, not epochs
    dataset=dict(times=1),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=184375, val_interval=5000)
optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="LayerDecay",
    # norms of the heads by their class, those of the backbone by their name
    paramwise_cfg=dict(
        norm_decay_mult=0.0, custom_keys=dict(norm=dict(decay_mult=0.0), pos_embed=dict(decay_mult=0.0))
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=184375, milestones=[163889, 177546], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
