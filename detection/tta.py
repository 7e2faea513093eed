"""Test-time augmentation of instance segmentation, by its boxes."""

from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample


@MODELS.register_module()
class BoxTTAModel(DetTTAModel):
    """Merges the boxes of the augmented images by NMS, without the masks: mmdet merges none, and would stop."""

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        for sample in data_samples:
            sample.pred_instances.pop("masks", None)
        return super()._merge_single_sample(data_samples)
