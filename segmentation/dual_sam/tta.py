"""Test-time augmentation of segmentors with one channel."""

import torch
from mmengine.model import BaseTTAModel
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample


class MaskTTAModel(BaseTTAModel):
    """The mean of the probabilities of all views of an image. (mmsegmentation's own takes the sigmoid of what is a
    probability already.)"""

    def merge_preds(self, data_samples_list: list[list[SegDataSample]]) -> list[SegDataSample]:
        """One prediction per image."""
        merged = []
        for samples in data_samples_list:
            mean = torch.stack([sample.seg_logits.data for sample in samples]).mean(dim=0)
            prediction = samples[0]
            mask = (mean > self.module.decode_head.threshold).to(mean.dtype)
            prediction.set_data({"seg_logits": PixelData(data=mean), "pred_sem_seg": PixelData(data=mask)})
            merged.append(prediction)
        return merged
