"""UPerNet 160k on ADE20K as of mmsegmentation's Swin-T: AdamW 6e-5, 8 GPUs with 2 crops; its users name a backbone."""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["segmentation.backbone"], allow_failed_imports=False)

# _delete_: else Swin's drop path would stay, as it did in the original configs
model = dict(backbone=dict(_delete_=True, type="SSMBackbone", checkpoint=None))
