"""From image to tokens (stems) and from stage to stage (downsampling). The Sequential indices are checkpoint keys."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from .conv2d import Conv2d
from .linear import get_linear, of_channels
from .norm import get_norm, is_channel_first, to_channel_first, to_channel_last

STEMS = ("v1", "v2")
DOWNSAMPLES = ("v1", "v2", "v3", "none")


def make_stem(
    version: str,
    in_chans: int,
    dim: int,
    patch_size: int,
    patch_norm: bool,
    norm_layer: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """(B, in_chans, H, W) -> (B, h, w, dim), or (B, dim, h, w) for channel-first norms.

    "v1": one convolution, kernel and stride `patch_size`. "v2": two of stride patch_size / 2 with overlap, which is
    `patch_size` in all only for 4, the published size; the published form is kept for the others too, `stem_stride`
    tells the truth.
    """
    dd = {"device": device, "dtype": dtype}
    channel_first = is_channel_first(norm_layer)
    norm = partial(get_norm(norm_layer), **dd) if patch_norm else nn.Identity
    last = nn.Identity if channel_first else to_channel_last
    first = nn.Identity if channel_first else to_channel_first
    if version == "v1":
        return nn.Sequential(Conv2d(in_chans, dim, patch_size, patch_size, **dd), last(), norm(dim))
    if version == "v2":
        stride = patch_size // 2
        conv = {"kernel_size": stride + 1, "stride": stride, "padding": 1, **dd}
        return nn.Sequential(
            Conv2d(in_chans, dim // 2, **conv),
            last(),
            norm(dim // 2),
            first(),
            nn.GELU(),
            Conv2d(dim // 2, dim, **conv),
            last(),
            norm(dim),
        )
    raise ValueError(f"patchembed_version={version!r} is not one of {', '.join(STEMS)}")


def stem_stride(version: str, patch_size: int) -> int:
    return patch_size if version == "v1" else (patch_size // 2) ** 2


def stem_grid(version: str, patch_size: int, size: int) -> int:
    """Tokens along a side of `size` pixels."""
    if version == "v1":
        return size // patch_size
    stride = patch_size // 2
    for _ in range(2):
        size = (size + 2 - (stride + 1)) // stride + 1
    return size


def make_downsample(
    version: str,
    dim: int,
    out_dim: int,
    norm_layer: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Halve height and width and change `dim` channels to `out_dim`; "none" does neither.

    Odd sizes: "v1" pads (rounds up), "v2" drops the last row or column (rounds down), "v3" rounds up.
    """
    dd = {"device": device, "dtype": dtype}
    channel_first = is_channel_first(norm_layer)
    if version == "v1":
        return PatchMerging(dim, out_dim, norm_layer, **dd)
    if version in ("v2", "v3"):
        kernel = {"kernel_size": 2, "stride": 2} if version == "v2" else {"kernel_size": 3, "stride": 2, "padding": 1}
        return nn.Sequential(
            nn.Identity() if channel_first else to_channel_first(),
            Conv2d(dim, out_dim, **kernel, **dd),
            nn.Identity() if channel_first else to_channel_last(),
            get_norm(norm_layer)(out_dim, **dd),
        )
    if version == "none":
        if dim != out_dim:
            raise ValueError(f"downsample_version='none' cannot change {dim} channels to {out_dim}: give equal dims")
        return nn.Identity()
    raise ValueError(f"downsample_version={version!r} is not one of {', '.join(DOWNSAMPLES)}")


@register_notrace_module
class PatchMerging(nn.Module):
    """Concatenate each 2x2 neighbourhood along the channels, norm, linear (Swin; "v1" here).

    Odd sizes are padded with a row or column of zeros at the bottom or right.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.channel_first = is_channel_first(norm_layer)
        self.reduction = get_linear(self.channel_first)(4 * dim, out_dim, bias=False, **dd)
        self.norm = get_norm(norm_layer)(4 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:] if self.channel_first else x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (() if self.channel_first else (0, 0)) + (0, width % 2, 0, height % 2))
        if self.channel_first:
            corners = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        else:
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.norm(torch.cat(corners, dim=1 if self.channel_first else -1))
        return of_channels(self.reduction, x, self.channel_first)
