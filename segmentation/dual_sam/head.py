"""The two decoders of Dual-SAM as a decode head of mmsegmentation."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from segmentation.dual_sam.connectivity import MAPS, mask_probability
from segmentation.dual_sam.decoder import FusionDecoder
from segmentation.dual_sam.loss import connectivity_loss, mutual_loss, mutual_weight

Features = Sequence[tuple[Sequence[Tensor], Tensor]]
"""Of the image and of its gamma copy: maps from the finest to the coarsest, and the bottom."""


class DualConnectivityHead(BaseModule):
    """A decoder for either view; the image's finest maps are the prediction.

    Args:
        in_channels, doublings, bottom_channels, channels: of `FusionDecoder`.
        threshold: from this probability on a pixel is animal. As a probability here is a product of two, the default
            is near 0.5 * 0.5.
        mutual: whether the decoders learn from each other, too.
        legacy: give the image's decoder the maps of the gamma copy and the other way round (not the bottoms), and
            look for the other ends of two-pixel connections at the places where the original code does.
    """

    num_classes = 2
    out_channels = MAPS
    align_corners = False

    def __init__(
        self,
        in_channels: Sequence[int],
        doublings: Sequence[int],
        bottom_channels: int = 256,
        channels: Sequence[int] = (32, 64, 128, 256),
        threshold: float = 65 / 255,
        mutual: bool = True,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(
            FusionDecoder(in_channels, doublings, bottom_channels, channels) for _ in ("image", "gamma")
        )
        self.threshold, self.mutual, self.legacy = threshold, mutual, legacy

    def forward(self, features: Features) -> list[list[Tensor]]:
        """Logits of connectivity (B, 8, H / s, W / s), s = 1, 2, 4, ..., of the image's decoder and of the gamma
        copy's."""
        (image, bottom), (gamma, gamma_bottom) = features
        if self.legacy:
            image, gamma = gamma, image
        return [self.decoders[0](image, bottom), self.decoders[1](gamma, gamma_bottom)]

    def loss(self, features: Features, labels: Tensor) -> dict[str, Tensor]:
        """Labels (B, H, W): 1 animal, 0 none, 255 neither."""
        # images are padded to fit the encoder
        height, width = labels.shape[-2:]
        first, second = (
            [maps[..., : -(-height // 2**level), : -(-width // 2**level)] for level, maps in enumerate(decoded)]
            for decoded in self(features)
        )
        losses = {"loss_connectivity": connectivity_loss(first, labels) + connectivity_loss(second, labels)}
        if self.mutual:
            losses["loss_mutual"] = mutual_weight(training_progress()) * mutual_loss(first, second, labels)
        return losses

    def decode(self, maps: Tensor) -> Tensor:
        """(B, 8, H, W) logits of connections -> (B, 1, H, W) logits of pixels."""
        return mask_probability(maps.float().sigmoid(), self.legacy)[:, None].logit(eps=1e-6)


def training_progress() -> float:
    """Part of the training that is over, 0 to 1: of the epochs (as published), or of the steps where it has none.

    From mmengine's hub of runtime information, which a resumed training continues.
    """
    hub = MessageHub.get_current_instance()
    epochs = hub.get_info("max_epochs")
    if epochs > 1:
        return hub.get_info("epoch") / epochs
    return hub.get_info("iter") / hub.get_info("max_iters")


class BottomNeck(BaseModule):
    """For backbones other than SAM: adds the map that the decoders begin with, by the layers of SAM's neck.

    Args:
        in_channels: of the coarsest map.
        channels: of the new one.
        doublings: of its resolution, as many as the head's for the coarsest map.
    """

    def __init__(self, in_channels: int, channels: int = 256, doublings: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, bias=False),
            LayerNorm2d(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            LayerNorm2d(channels),
        )
        self.scale = 2**doublings

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        bottom = self.layers(maps[-1])
        if self.scale > 1:
            bottom = F.interpolate(bottom, scale_factor=self.scale, mode="bilinear")
        return (*maps, bottom)
