"""Backbones for dense prediction: a norm on every stage's map, a tuple of NCHW maps, no classifier. Framework-free.

What no map needs (later stages, the last norm, the classifier) is not there: every parameter gets a gradient in every
step, which is what distributed training asks for.

`DenseBackbone` makes one from a name of the registry; the classes below it are the families' own forms.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # of all dimensions, synchronised or not

from . import vim, vssd, vssm
from .checkpoint import load_checkpoint
from .layers.mlp import Mlp
from .layers.norm import get_norm
from .vim import VisionMamba
from .vssd import VSSD
from .vssm import VSSM


def DenseBackbone(  # a constructor to its users
    name: str,
    out_indices: Sequence[int] | None = None,
    checkpoint: str | Path | None = None,
    *,
    drop_path_rate: float | None = None,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    use_checkpoint: bool = False,
    recompute_act: bool = True,
    model_args: Mapping[str, Any] | None = None,
) -> Dense:
    """A registered model as a pyramid of maps.

    Args:
        name: of the registry, "vmamba_tiny_s1l8".
        out_indices: stages (VMamba, VSSD) or blocks (Vim) whose maps are given out. None: all stages, or the last
            blocks of the four quarters.
        checkpoint: file of weights, see `load_checkpoint`; a classifier's or a backbone's. None: random weights.
        drop_path_rate: of the last block, None for the model's own.
        frozen_stages: -1 trains everything, 0 all but the stem, n all but the stem and the first n stages with the
            norms of their maps (blocks of Vim). What is frozen has no gradients and stays in evaluation mode.
        norm_eval: keep the running statistics of batch norms as they are.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        recompute_act: recompute the activations of MLPs alone: a sixth less memory on large images for 1 % more time.
        model_args: further arguments of the family's constructor, such as {"norm_layer": "ln"}.

    Raises:
        ValueError: an unknown name, stages that there are not.
        TypeError: an argument that the family has not.
        CheckpointError: a file that does not fit, by its first differing names.
    """
    family = next((family for family, variants in _FAMILIES.items() if name in variants), None)
    if family is None:
        known = [known for variants in _FAMILIES.values() for known in variants]
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"{name!r} is not a model of the zoo; did you mean {' or '.join(near)}?")
    arguments = {**_FAMILIES[family][name], **(model_args or {}), "use_checkpoint": use_checkpoint}
    if drop_path_rate is not None:
        arguments["drop_path_rate"] = drop_path_rate
    if out_indices is not None:
        arguments["out_indices"] = out_indices
    elif family is DenseVisionMamba:
        arguments["out_indices"] = [arguments.get("depth", 24) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    else:
        arguments["out_indices"] = range(len(arguments["depths"]))
    backbone = family(**arguments)
    for module in backbone.modules():
        if isinstance(module, Mlp):
            module.recompute = recompute_act
    if checkpoint is not None:
        load_checkpoint(backbone, checkpoint)
    backbone.freeze(frozen_stages, norm_eval)
    return backbone


class Dense(nn.Module):
    """What all backbones have; goes before the family among the bases.

    Attributes:
        out_channels: channels of the maps, in their order.
        total_layers: layers of the whole model; `layers` has those that the maps need.
        unneeded: names that weights of the whole model have and no map of this one needs; loaders leave them out.
    """

    gives_maps = True
    out_channels: list[int]
    unneeded: frozenset[str]
    total_layers: int
    _frozen: Sequence[nn.Module] = ()
    _norm_eval = False

    def freeze(self, stages: int, norm_eval: bool) -> None:
        """See `DenseBackbone`. Raises ValueError for more stages than there are."""
        if not -1 <= stages <= self.total_layers:
            raise ValueError(f"frozen_stages={stages} is not between -1 and {self.total_layers}")
        frozen = [self.patch_embed, *self.layers[:stages]] if stages >= 0 else []
        # the norms of their maps with them, as in Swin's backbone
        frozen += [norm for i in range(stages) if (norm := getattr(self, f"outnorm{i}", None)) is not None]
        for part in frozen:
            part.requires_grad_(False)
        if stages >= 0 and getattr(self, "pos_embed", None) is not None:
            self.pos_embed.requires_grad_(False)
        # a tuple, which does not register the modules a second time
        self._frozen, self._norm_eval = tuple(frozen), norm_eval
        self.train(self.training)

    def _keep(self, layers: int, *dropped: str) -> None:
        """Keep the first `layers` layers (of stages not the last way down), and of other modules all but `dropped`."""
        whole, self.total_layers = self.state_dict().keys(), len(self.layers)
        self.layers, self.feature_info = self.layers[:layers], self.feature_info[:layers]
        if hasattr(self.layers[-1], "downsample"):
            self.layers[-1].downsample = nn.Identity()
        for name in dropped:
            delattr(self, name)
        self.unneeded = frozenset(whole - self.state_dict().keys())

    def train(self, mode: bool = True):
        super().train(mode)
        for part in self._frozen:
            part.eval()
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self


class _Hierarchical(Dense):
    """A family with stages."""

    def _give_out(self, out_indices: Sequence[int], norm: Callable[[int], nn.Module], *dropped: str) -> None:
        """Norms for the maps of these stages; what they do not need goes, and the modules `dropped`."""
        bad = [i for i in out_indices if not 0 <= i < self.num_layers]
        if bad or not out_indices:
            raise ValueError(f"out_indices={tuple(out_indices)} must name stages 0..{self.num_layers - 1}")
        if len(set(out_indices)) < len(out_indices):
            raise ValueError(f"out_indices={tuple(out_indices)} names a stage twice")
        self.out_indices = tuple(sorted(out_indices))
        self.out_channels = [self.dims[i] for i in self.out_indices]
        for i in range(self.num_layers):
            self.add_module(f"outnorm{i}", norm(self.dims[i], **self._device_and_dtype()))
        dropped += tuple(f"outnorm{i}" for i in range(self.num_layers) if i not in self.out_indices)
        self._keep(self.out_indices[-1] + 1, *dropped)

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


class DenseVSSM(_Hierarchical, VSSM):
    """VMamba as a backbone; keys are those of `VSSM` up to the last stage wanted, plus `outnorm{i}`.

    Args:
        out_indices: stages whose maps are given out, from the first to the last.
        others: of `VSSM`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), norm_layer: str = "ln", **vssm_args):
        super().__init__(norm_layer=norm_layer, **vssm_args)
        self._give_out(out_indices, get_norm(norm_layer), "classifier")


class DenseVSSD(_Hierarchical, VSSD):
    """VSSD as a backbone; keys are those of `VSSD` up to the last stage wanted, plus `outnorm{i}`.

    Args:
        out_indices: stages whose maps are given out, from the first to the last.
        others: of `VSSD`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), **vssd_args):
        super().__init__(**vssd_args)
        self._give_out(out_indices, nn.LayerNorm, "norm", "pool", "head")


class DenseVisionMamba(Dense, VisionMamba):
    """Vim as a backbone: maps of one stride after some of its blocks, brought to the strides 4, 8, 16, 32.

    Class tokens and their rows of the position embedding are left out; keys are otherwise those of `VisionMamba` up to
    the last block wanted, without the head and (but for "add & norm") the last norm, plus `fpn1`, `fpn2` as in the
    published segmentation models (there with SyncBatchNorm, which `torch.nn.SyncBatchNorm.convert_sync_batchnorm`
    gives).
    Without them, `ssm_models.layers.simple_fpn` makes the pyramid of the published detectors.

    Args:
        out_indices: blocks, one per map; a single one makes all four.
        if_fpn: bring the maps to four strides. It needs a stride of 16, 8 or 4.
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
        depth, stride = len(self.layers), self.patch_embed.stride
        if not out_indices or any(not 0 <= i < depth for i in out_indices):
            raise ValueError(f"out_indices={tuple(out_indices)} must name blocks 0..{depth - 1}")
        if len(set(out_indices)) < len(out_indices):
            raise ValueError(f"out_indices={tuple(out_indices)} names a block twice")
        if if_fpn and (stride not in _FPNS or len(out_indices) not in (1, 4)):
            raise ValueError(
                "if_fpn makes four maps of one or four out_indices at stride 16, 8 or 4, not of "
                f"{tuple(out_indices)} at stride {stride}; if_fpn=False gives the maps as they are"
            )
        self.out_indices = tuple(sorted(out_indices))
        self.use_residual_as_feature, self.last_layer_process = use_residual_as_feature, last_layer_process
        self.if_fpn = if_fpn
        last = self.out_indices[-1]
        normed = use_residual_as_feature and last_layer_process == "add & norm" and last == depth - 1
        last += self.if_bidirectional and last % 2 == 0  # pairs stay together
        self._keep(last + 1, "head", *(() if normed else ("norm_f",)))
        self.out_channels = [self.embed_dim] * (4 if if_fpn else len(out_indices))
        if if_fpn:
            levels = [level.to(self.patch_embed.proj.weight) for level in _FPNS[stride](self.embed_dim)]
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = levels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, in_chans, H, W) -> maps (B, C, H_i, W_i), contiguous: of strides 4, 8, 16, 32 with `if_fpn`."""
        x, order, grid = self.forward_stem(x)
        taps = self.forward_blocks(x, order, grid, self.out_indices)[2]
        maps = []
        for i, (hidden, residual) in zip(self.out_indices, taps, strict=True):
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
        if index < self.total_layers - 1:
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


def _fpn_of_stride_4(dim: int) -> tuple[nn.Module, ...]:
    return nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4), nn.MaxPool2d(8)


_FPNS = {16: _fpn_of_stride_16, 8: _fpn_of_stride_8, 4: _fpn_of_stride_4}
_FAMILIES = {DenseVSSM: vssm.VARIANTS, DenseVSSD: vssd.VARIANTS, DenseVisionMamba: vim.VARIANTS}
