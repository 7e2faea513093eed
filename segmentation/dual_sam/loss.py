"""What Dual-SAM learns from: connectivity of the masks, and of what the other view's decoder is sure of."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from segmentation.dual_sam.connectivity import connectivity

_CERTAIN = 0.5001


def mutual_weight(progress: float) -> float:
    """Weight of mutual supervision when a part `progress` (0 to 1) of the training is over: 0.1 exp(-5 (1 - t)^2)."""
    return 0.1 * math.exp(-5 * (1 - progress) ** 2)


def connectivity_loss(logits: Sequence[Tensor], labels: Tensor, ignore: int = 255) -> Tensor:
    """Binary cross-entropy of all scales, summed.

    Args:
        logits: (B, 8, H / s, W / s) for s = 1, 2, 4, ... of the finest.
        labels: (B, H, W) integers: 1 animal, 0 none, `ignore` neither; every s-th pixel of it at scale s.
    """
    loss = 0
    for maps, scaled in zip(logits, scales(labels, len(logits)), strict=True):
        target = connectivity((scaled == 1).float())
        loss = loss + _mean(_entropy(maps, target), scaled != ignore)
    return loss


def mutual_loss(first: Sequence[Tensor], second: Sequence[Tensor], labels: Tensor, ignore: int = 255) -> Tensor:
    """Each view's decoder against the decisions of the other's, all scales summed; arguments as above."""
    loss = 0
    for a, b, scaled in zip(first, second, scales(labels, len(first)), strict=True):
        for own, other in ((a, b), (b, a)):
            decided = (other.detach().sigmoid() >= _CERTAIN).float()
            loss = loss + _mean(_entropy(own, decided), scaled != ignore)
    return loss


def scales(labels: Tensor, number: int) -> list[Tensor]:
    """(B, H, W) -> every pixel, every second, every fourth, ... of both directions."""
    return [labels[..., :: 2**level, :: 2**level] for level in range(number)]


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Of (B, 8, H, W) where (B, H, W) is true; zero where it is nowhere."""
    valid = valid[:, None].to(values.dtype)
    return (values * valid).sum() / (valid.sum() * values.shape[1]).clamp(min=1)
