"""Criss-cross connectivity (C3P): a mask as eight maps, one per neighbour at one and two pixels in the four directions.

Legend: B images, H W pixels. Map i at (y, x) is mask(y, x) * mask((y, x) + OFFSETS[i]), zero outside the image. Maps i
and 7 - i have opposite neighbours, so each pair of pixels is seen twice, once from either end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = ((-2, 0), (-1, 0), (0, -2), (0, -1), (0, 1), (0, 2), (1, 0), (2, 0))
"""(dy, dx) of the neighbour, by map."""
MAPS = len(OFFSETS)

# where the original code looks instead: it shifts by one pixel, and down or right for shifts of "+1" only, not of "+2"
_LEGACY_OFFSETS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 1), (0, 1), (1, 0), (1, 0))


def shifted(x: Tensor, offset: tuple[int, int]) -> Tensor:
    """(..., H, W): the value of the neighbour at `offset` (dy, dx), zero outside."""
    (dy, dx), (height, width) = offset, x.shape[-2:]
    reach = max(abs(dy), abs(dx))
    padded = F.pad(x, (reach, reach, reach, reach))
    return padded[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def connectivity(mask: Tensor) -> Tensor:
    """Targets of a mask: (B, H, W) of 0 and 1, any dtype -> (B, 8, H, W)."""
    return torch.stack([mask * shifted(mask, offset) for offset in OFFSETS], dim=1)


def mask_probability(maps: Tensor, legacy: bool = False) -> Tensor:
    """(B, 8, H, W) probabilities of connections -> (B, H, W) of the pixels.

    A connection counts as far as both its ends see it; a pixel, as its best connection. Of the targets of a mask all
    of whose parts are connected in a row or column by 1 or 2 pixels, this is the mask.

    Args:
        legacy: take the other end where the original code looks for it, which is wrong for the two-pixel maps.
    """
    offsets = _LEGACY_OFFSETS if legacy else OFFSETS
    both = [maps[:, i] * shifted(maps[:, MAPS - 1 - i], offset) for i, offset in enumerate(offsets)]
    return torch.stack(both, dim=1).amax(dim=1)
