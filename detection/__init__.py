"""COCO detection and instance segmentation with the zoo, through mmdet."""
