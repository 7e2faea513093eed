"""From image to tokens and from stage to stage in VSSD, by convolutions. Module names are checkpoint keys.

Shi et al. 2024, "VSSD", section 3.3 (https://arxiv.org/abs/2407.18559); "simple" are the plainer forms of its ablation,
"RMT" those of Fan et al. 2023, "RMT: Retentive Networks Meet Vision Transformers" (https://arxiv.org/abs/2309.11523),
which VSSD's second generation has.

Shapes: B batch, H W map. Images are (B, 3, H, W), tokens (B, H, W, C). Convolutions see tokens as channels_last
memory and give them back so: no step copies for the layout. Odd sizes round up, but in `SimpleStem`.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import register_notrace_module
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .autodiff import to_channels_last
from .conv import ConvNormAct
from .conv2d import Conv2d, activated
from .onednn import is_plain, unwatched


@register_notrace_module
class ConvStem(nn.Module):
    """(B, in_chans, H, W) -> (B, ceil(H/4), ceil(W/4), dim), by five convolutions with BatchNorm."""

    def __init__(self, in_chans: int, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        half = dim // 2
        self.conv1 = ConvNormAct(in_chans, half, 3, stride=2, padding=1, **dd)
        self.conv2 = nn.Sequential(
            ConvNormAct(half, half, 3, padding=1, **dd), ConvNormAct(half, half, 3, padding=1, act=False, **dd)
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(half, 4 * dim, 3, stride=2, padding=1, **dd), ConvNormAct(4 * dim, dim, 1, act=False, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(to_channels_last(x))
        x = x + self.conv2(x)
        return self.conv3(x).permute(0, 2, 3, 1)


@register_notrace_module
class SimpleStem(nn.Module):
    """(B, in_chans, H, W) -> (B, H//4, W//4, dim): 4x4 patches, BatchNorm, ReLU, LayerNorm."""

    def __init__(self, in_chans: int, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv1 = ConvNormAct(in_chans, dim, 4, stride=4, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(to_channels_last(x))
        return self.norm(x.permute(0, 2, 3, 1))


@register_notrace_module
class ConvDownsample(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C): widen to 8C, depthwise 3x3 of stride 2, narrow to 2C."""

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        wide = 8 * dim
        self.conv = nn.Sequential(
            ConvNormAct(dim, wide, 1, bias=True, norm=False, **dd),
            ConvNormAct(wide, wide, 3, stride=2, padding=1, groups=wide, bias=True, norm=False, **dd),
            ConvNormAct(wide, 2 * dim, 1, bias=True, act=False, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class SimpleDownsample(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C): 3x3 convolution of stride 2, ReLU, LayerNorm.

    The ReLU before the norm is the published code's; weights trained with it need it.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Sequential(ConvNormAct(dim, 2 * dim, 3, stride=2, padding=1, bias=True, norm=False, **dd))
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@register_notrace_module
class RMTStem(nn.Module):
    """(B, in_chans, H, W) -> (B, ceil(H/4), ceil(W/4), dim): four 3x3 convolutions with BatchNorm, GELU between them.

    `timm.utils.reparameterize_model` calls `fuse`.
    """

    def __init__(self, in_chans: int, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate([(in_chans, dim // 2), (dim // 2, dim // 2), (dim // 2, dim), (dim, dim)]):
            conv = Conv2d(before, after, kernel_size=3, stride=1 if i % 2 else 2, padding=1, **dd)
            layers += [conv, nn.BatchNorm2d(after, **dd), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(to_channels_last(x)).permute(0, 2, 3, 1)

    def _convolve(self, x: Tensor) -> Tensor:
        norms = self.proj[1::3]
        if not all(isinstance(norm, nn.Identity) for norm in norms) or not unwatched(self.proj, *norms):
            return self.proj(x)
        for conv, act in zip(self.proj[:-3:3], self.proj[2::3], strict=True):
            x = activated(conv, act, x)
        return self.proj[-2](x)

    def fuse(self) -> RMTStem:
        """Itself, with the running statistics folded into the convolutions; for a module in eval mode."""
        for i in range(0, len(self.proj), 3):
            self.proj[i], self.proj[i + 1] = _folded(self.proj[i], self.proj[i + 1])
        return self


@register_notrace_module
class RMTDownsample(nn.Module):
    """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C): 3x3 convolution of stride 2, BatchNorm.

    `timm.utils.reparameterize_model` calls `fuse`.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)

    def fuse(self) -> RMTDownsample:
        """As `RMTStem.fuse`."""
        self.reduction, self.norm = _folded(self.reduction, self.norm)
        return self


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution that does the norm's work, too, and nothing in the place of the norm; both as they are where the
    convolution is more than its weight."""
    if isinstance(norm, nn.Identity) or not is_plain(conv, Conv2d) or not unwatched(norm):
        return conv, norm
    return fuse_conv_bn_eval(conv, norm), nn.Identity()


def get_stem(simple: bool, rmt: bool) -> type[nn.Module]:
    """The constructor that is meant by VSSD's arguments `simple_patch_embed` and `rmt_patch_embed`."""
    return _one_of("patch_embed", simple, rmt, (ConvStem, SimpleStem, RMTStem))


def get_downsample(simple: bool, rmt: bool) -> type[nn.Module]:
    """The constructor that is meant by VSSD's arguments `simple_downsample` and `rmt_downsample`."""
    return _one_of("downsample", simple, rmt, (ConvDownsample, SimpleDownsample, RMTDownsample))


def _one_of(name: str, simple: bool, rmt: bool, forms: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    if simple and rmt:
        raise ValueError(f"simple_{name}=True and rmt_{name}=True exclude each other")
    return forms[1 if simple else 2 if rmt else 0]
