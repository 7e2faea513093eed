"""Backbones for dense prediction: a norm on every stage's map, a tuple of NCHW maps, no classifier. Framework-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn as nn
from torch import Tensor

from .layers.norm import get_norm
from .vim import VisionMamba
from .vssd import VSSD
from .vssm import VSSM


class _Dense(nn.Module):
    """What a hierarchical family needs to become a backbone; goes before it among the bases."""

    def _add_outnorms(self, out_indices: Sequence[int], norm: Callable[[int], nn.Module]) -> None:
        bad = [i for i in out_indices if not 0 <= i < self.num_layers]
        if bad or not out_indices:
            raise ValueError(f"out_indices={tuple(out_indices)} must name stages 0..{self.num_layers - 1}")
        self.out_indices = tuple(out_indices)
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", norm(self.dims[i]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_chans, H, W) -> maps (B, dims[i], H_i, W_i) for i in out_indices, contiguous."""
        maps = []
        x = self.forward_stem(x)
        for i, stage in enumerate(self.layers):
            x = stage.blocks(x)
            if i in self.out_indices:
                maps.append(self._to_format(getattr(self, f"outnorm{i}")(x), "NCHW"))
            x = stage.downsample(x)
        return tuple(maps)


class DenseVSSM(_Dense, VSSM):
    """VMamba as a backbone; keys are those of `VSSM` without the classifier, plus `outnorm{i}`.

    Args:
        out_indices: stages whose maps are given out.
        others: of `VSSM`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), norm_layer: str = "ln", **vssm_args):
        super().__init__(norm_layer=norm_layer, **vssm_args)
        del self.classifier
        self._add_outnorms(out_indices, get_norm(norm_layer))


class DenseVSSD(_Dense, VSSD):
    """VSSD as a backbone; keys are those of `VSSD` without norm and head, plus `outnorm{i}`.

    Args:
        out_indices: stages whose maps are given out.
        others: of `VSSD`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), **vssd_args):
        super().__init__(**vssd_args)
        del self.norm, self.pool, self.head
        self._add_outnorms(out_indices, nn.LayerNorm)


class DenseVisionMamba(VisionMamba):
    """Vim as a backbone: maps of one stride after some of its blocks, brought to the strides 4, 8, 16, 32.

    Class tokens and their rows of the position embedding are left out; keys are otherwise those of `VisionMamba`
    without the head, plus `fpn1`, `fpn2` as in the published segmentation models (there with SyncBatchNorm, which
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` gives).

    Args:
        out_indices: blocks, one per map; a single one makes all four.
        if_fpn: bring the maps to four strides. It needs a stride of 16 or 8.
        use_residual_as_feature: maps of the residual stream; else of what a block adds to it, as first published.
        last_layer_process: of the last block's map with `use_residual_as_feature`: "none" (what it adds), "add" (the
            stream) or "add & norm".
        others: of `VisionMamba`.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        if_fpn: bool = True,
        use_residual_as_feature: bool = False,
        last_layer_process: str = "none",
        **vim_args,
    ):
        processes = ("none", "add", "add & norm")
        if last_layer_process not in processes:
            raise ValueError(f"last_layer_process={last_layer_process!r} is not one of {', '.join(processes)}")
        super().__init__(if_cls_token=False, **vim_args)
        del self.head
        depth, stride = len(self.layers), self.patch_embed.stride
        if not out_indices or any(not 0 <= i < depth for i in out_indices):
            raise ValueError(f"out_indices={tuple(out_indices)} must name blocks 0..{depth - 1}")
        if len(set(out_indices)) < len(out_indices):
            raise ValueError(f"out_indices={tuple(out_indices)} names a block twice")
        if if_fpn and (stride not in _FPNS or len(out_indices) not in (1, 4)):
            raise ValueError(
                f"if_fpn makes four maps of one or four out_indices at stride 16 or 8, not of {tuple(out_indices)} at "
                f"stride {stride}; if_fpn=False gives the maps as they are"
            )
        self.out_indices = tuple(out_indices)
        self.use_residual_as_feature, self.last_layer_process = use_residual_as_feature, last_layer_process
        self.if_fpn = if_fpn
        if if_fpn:
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = _FPNS[stride](self.embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_chans, H, W) -> maps (B, C, H_i, W_i), contiguous: of strides 4, 8, 16, 32 with `if_fpn`."""
        x, order, grid = self.forward_stem(x)
        taps = self.forward_blocks(x, order, grid, self.out_indices, max(self.out_indices))[2]
        maps = []
        for i, (hidden, residual) in zip(sorted(self.out_indices), taps, strict=True):
            feature = self._feature(i, hidden, residual)
            maps.append(feature.transpose(1, 2).unflatten(2, grid))
        if self.if_fpn:
            maps = maps * (4 // len(maps))
            levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
            maps = [level(x) for level, x in zip(levels, maps, strict=True)]
        return tuple(x.contiguous() for x in maps)

    def _feature(self, index: int, hidden: Tensor, residual: Tensor) -> Tensor:
        if not self.use_residual_as_feature:
            return hidden
        if index < len(self.layers) - 1:
            return self._stream(hidden, residual)
        if self.last_layer_process == "none":
            return hidden
        return (
            self._stream(hidden, residual) if self.last_layer_process == "add" else self._final_norm(residual + hidden)
        )


def _fpn_of_stride_16(dim: int) -> tuple[nn.Module, ...]:
    def up() -> nn.Module:
        return nn.ConvTranspose2d(dim, dim, 2, 2)

    return (
        nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up()),
        nn.Sequential(up()),
        nn.Identity(),
        nn.MaxPool2d(2),
    )


def _fpn_of_stride_8(dim: int) -> tuple[nn.Module, ...]:
    return nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2)), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)


_FPNS = {16: _fpn_of_stride_16, 8: _fpn_of_stride_8}
