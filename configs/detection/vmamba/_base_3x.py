"""Mask R-CNN 3x on COCO as of mmdet's Swin-T: AdamW 1e-4, 8 GPUs with 2 images; its users name a backbone."""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["detection.backbone"], allow_failed_imports=False)

# _delete_: else Swin's drop path would stay, as it did in the original configs
model = dict(backbone=dict(_delete_=True, type="SSMBackbone", checkpoint=None))
