"""Dual-SAM as a segmentor of mmsegmentation: one encoder, two views, a prompt that couples them, two decoders.

Legend: B images, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from segmentation.dual_sam.head import Features


class DualSAM(EncoderDecoder):
    """Reads what `GammaCopy` makes: (B, 6, H, W), image and gamma copy, of any height and width.

    A prediction has beside `pred_sem_seg` (0 and 1) and `seg_logits` (the probability of the animal, as
    mmsegmentation has it for one channel) the eight maps `connectivity`, as probabilities of the size of the input.

    Args:
        backbone: `SAMEncoder`, or any backbone that gives maps from the finest to the coarsest.
        neck: None with SAM, whose last map is its own neck's; `BottomNeck` else.
        prompt: `CoupledPrompt`.
        decode_head: `DualConnectivityHead`.
        size_divisor: images are padded to multiples of it, which is the stride of the coarsest map.
        legacy: the behaviour of the original code in prompt, head and metric, where published numbers may depend on
            it: see `PromptLevel`, `DualConnectivityHead` and `MarineMetric`.
        test_cfg, data_preprocessor: of every segmentor.
    """

    def __init__(
        self,
        backbone: dict,
        prompt: dict,
        decode_head: dict,
        size_divisor: int,
        neck: dict | None = None,
        legacy: bool = False,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        train_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            backbone,
            {**decode_head, "legacy": legacy},
            neck=neck,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor,
        )
        self.prompt = MODELS.build({**prompt, "legacy": legacy})
        self.size_divisor, self.legacy = size_divisor, legacy

    def extract_feat(self, inputs: Tensor) -> Features:
        """(B, 6, H, W) -> maps and bottom of either view."""
        height, width = inputs.shape[-2:]
        inputs = F.pad(inputs, (0, -width % self.size_divisor, 0, -height % self.size_divisor))
        image, gamma = inputs.chunk(2, dim=1)
        maps = super().extract_feat(torch.cat([image, gamma]))
        *image_maps, image_bottom = (each.chunk(2)[0] for each in maps)
        *gamma_maps, gamma_bottom = (each.chunk(2)[1] for each in maps)
        image_maps, gamma_maps = self.prompt(image + gamma, image_maps, gamma_maps)
        return (image_maps, image_bottom), (gamma_maps, gamma_bottom)

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Losses by their names in the log."""
        labels = torch.cat([sample.gt_sem_seg.data for sample in data_samples])
        losses = self.decode_head.loss(self.extract_feat(inputs), labels)
        return {f"decode.{name}": value for name, value in losses.items()}

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict[str, Any]]) -> Tensor:
        """(B, 6, H, W) -> (B, 8, H, W) logits of the image's connectivity. What it was trained on stays unread."""
        [maps, *_], _ = self.decode_head(self.extract_feat(inputs))
        return maps[..., : inputs.shape[-2], : inputs.shape[-1]]

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """One prediction per image, as described above."""
        metas = [sample.metainfo for sample in data_samples or ()]
        whole = {"ori_shape": inputs.shape[2:], "img_shape": inputs.shape[2:]}
        maps = self.inference(inputs, metas or [dict(whole) for _ in inputs])
        samples = self.postprocess_result(self.decode_head.decode(maps), data_samples)
        for sample, connections in zip(samples, maps, strict=True):
            sample.set_data({"connectivity": PixelData(data=connections.float().sigmoid())})
            if self.legacy:
                sample.set_metainfo({"legacy": True})
        return samples
