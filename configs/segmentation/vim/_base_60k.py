"""UPerNet 60k of Vim on ADE20K, 4 GPUs with 8 crops of 512 pixels; its users name the backbone and the rates."""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]
custom_imports = dict(imports=["segmentation.backbone"], allow_failed_imports=False)

crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    # the original passes the number of channels in the place of d_state, and then reads no image
    backbone=dict(
        _delete_=True,
        type="SSMBackbone",
        checkpoint=None,
        drop_path_rate=0.1,
        out_indices=[5, 11, 17, 23],
        model_args=dict(img_size=512, if_fpn=True),
    ),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)

train_dataloader = dict(batch_size=8)
train_cfg = dict(max_iters=60000, val_interval=1000)
# decays every block by its depth: the original looks for another name and decays stem and position embedding alone
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecay",
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=1000, max_keep_ckpts=2, save_best="mIoU"))
