"""What Dual-SAM's method is compared with: the same backbone, data and schedule, one view, and UPerNet's head with one
channel."""

_base_ = "dual_vmamba-nano_camouflage.py"
model = dict(
    _delete_=True,
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[124.55, 118.90, 102.94],
        std=[56.77, 55.97, 57.50],
        bgr_to_rgb=True,
        size=_base_.crop_size,
    ),
    backbone=dict(type="SSMBackbone", name="vmamba_nano", checkpoint=None, drop_path_rate=0.0),
    decode_head=dict(
        type="UPerHead",
        in_channels=[32, 64, 128],
        in_index=[0, 1, 2],
        channels=64,
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        dropout_ratio=0.0,
        norm_cfg=dict(type="BN", requires_grad=True),
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True),
    ),
    test_cfg=dict(mode="whole"),
)
visualizer = dict(type="SegLocalVisualizer")
# without GammaCopy
train_pipeline = [_base_.train_pipeline[0], *_base_.train_pipeline[2:]]
test_pipeline = [_base_.test_pipeline[0], *_base_.test_pipeline[2:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
