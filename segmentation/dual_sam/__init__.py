"""Dual-SAM, binary segmentation of marine animals (Zhang et al., CVPR 2024, arXiv 2404.04996), on SAM or any backbone.

connectivity  masks as eight maps of "this pixel and that neighbour are both animal", and back
gamma         the second view of an image
sam, lora, adapter   SAM's frozen encoder and what of it is trained
prompt        what couples the two views, level by level
decoder       dilated fusion attention, connectivity at every scale
loss          connectivity and mutual supervision with its schedule
head, segmentor, transforms, dataset, metric, visualizer, tta   the same as components of mmsegmentation

The first seven need PyTorch and timm alone. Configs import `segmentation.dual_sam.registration`.
"""
