"""Parameters and multiply-accumulates (MACs) of detectors and segmentors, as the papers' tables count them.

Nothing is computed: all tensors are of the meta device, so a count takes seconds and no memory, and no random weights
decide what is found. Backbones of the zoo are counted by `ssm_models.model_card`, in the convention of their tables.
Everything else follows fvcore, as those tables do: convolutions and products of matrices their MACs, LayerNorm 5 per
number, BatchNorm 2, bilinear resizing 4, other resizing and pooling 1; activations, additions, RoIAlign and NMS
nothing. Heads of detectors see 1000 proposals, and heads of masks 100 boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from ssm_mm.backbone import is_ours
from ssm_models import model_card
from ssm_train.common.errors import UserError

PROPOSALS, MASKS = 1000, 100


def _outputs(*_, out_shape) -> int:
    return 2 * prod(out_shape)


def _inputs(x, *_, out_shape) -> int:
    return 2 * prod(x)


def _layer_norm(x, *_, out_shape) -> int:
    return 2 * 5 * prod(x)


def _batch_norm(x, *_, out_shape) -> int:
    return 2 * 2 * prod(x)


def _bilinear(*_, out_shape) -> int:
    return 2 * 4 * prod(out_shape)


aten = torch.ops.aten
_FVCORE = {
    aten.native_layer_norm: _layer_norm,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
    aten.upsample_nearest2d: _outputs,
    aten.upsample_bilinear2d: _bilinear,
    aten._adaptive_avg_pool2d: _inputs,
    aten.mean: _inputs,
}
"""FLOPs (two per MAC) of what `FlopCounterMode` does not know."""


@dataclass(frozen=True)
class Part:
    """A part of a model in one test-time pass over one image."""

    name: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class DenseCard:
    """What a detector or segmentor costs for one image."""

    image: tuple[int, int]
    """(height, width)"""
    parts: tuple[Part, ...]
    """In the order of their use; training's own heads are among them, with 0 MACs."""

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.parts)

    def __str__(self) -> str:
        rows = [*self.parts, Part("total", self.parameters, self.macs)]
        lines = [f"{row.name:<16} {row.parameters / 1e6:>10.3f} M {row.macs / 1e9:>12.3f} G" for row in rows]
        height, width = self.image
        return "\n".join([f"{'':<16} {'parameters':>12} {f'MACs, {width}x{height}':>14}", *lines])


def dense_card(cfg: Config, image: tuple[int, int]) -> DenseCard:
    """Count the model of a config, whose modules are imported.

    Args:
        image: (height, width), padded as the model's data preprocessor does: multiples of 32 for detectors.

    Raises:
        UserError: a model that is neither a two-stage detector nor an encoder-decoder, or an image that is too small.
    """
    if min(image) < 1:
        raise UserError(f"an image of {image[1]}x{image[0]} pixels has no area")
    # others are built in memory: Swin, for one, reads numbers from tensors
    with torch.device("meta" if is_ours(cfg.model.backbone) else "cpu"):
        # building changes the config
        model = MODELS.build(copy.deepcopy(cfg.model)).to("meta").eval()
    heads = _detector_heads if hasattr(model, "roi_head") else _segmentor_heads
    if not hasattr(model, "roi_head") and not hasattr(model, "decode_head"):
        raise UserError(f"{type(model).__name__} has neither roi_head nor decode_head: its cost cannot be counted")
    try:
        backbone, maps = _count_backbone(model.backbone, image)
        costs = {"backbone": backbone, **heads(model, maps)}
    except RuntimeError as error:
        raise UserError(f"an image of {image[1]}x{image[0]} cannot be counted: {error}") from error
    parts = [Part(name, _parameters(child), costs.get(name, 0)) for name, child in model.named_children()]
    return DenseCard(tuple(image), tuple(part for part in parts if part.parameters or part.macs))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _count_backbone(backbone: nn.Module, image: tuple[int, int]) -> tuple[int, tuple[Tensor, ...]]:
    x = torch.empty(1, 3, *image, device="meta")
    if not getattr(backbone, "gives_maps", False):
        return _count(backbone, x)
    with torch.no_grad():
        return model_card(backbone, (3, *image)).macs_official, backbone(x)


def _count_neck(model: nn.Module, maps: tuple[Tensor, ...]) -> tuple[int, tuple[Tensor, ...]]:
    return _count(model.neck, maps) if model.with_neck else (0, maps)


def _detector_heads(model: nn.Module, maps: tuple[Tensor, ...]) -> dict[str, int]:
    neck, levels = _count_neck(model, maps)
    rpn, _ = _count(model.rpn_head, levels)
    roi = model.roi_head
    boxes = _regions(roi.bbox_roi_extractor, PROPOSALS)
    masks = _regions(roi.mask_roi_extractor, MASKS) if roi.with_mask else None
    # a cascade has a list of heads; its masks are the mean of all of them
    box_heads = roi.bbox_head if isinstance(roi.bbox_head, nn.ModuleList) else [roi.bbox_head]
    macs = sum(_count(head, boxes)[0] for head in box_heads)
    if masks is not None:
        mask_heads = roi.mask_head if isinstance(roi.mask_head, nn.ModuleList) else [roi.mask_head]
        macs += sum(_count(head, masks)[0] for head in mask_heads)
    return {"neck": neck, "rpn_head": rpn, "roi_head": macs}


def _regions(extractor: nn.Module, number: int) -> Tensor:
    extractor = extractor[0] if isinstance(extractor, nn.ModuleList) else extractor
    return torch.empty(number, extractor.out_channels, *extractor.roi_layers[0].output_size, device="meta")


def _segmentor_heads(model: nn.Module, maps: tuple[Tensor, ...]) -> dict[str, int]:
    neck, maps = _count_neck(model, maps)
    return {"neck": neck, "decode_head": _count(model.decode_head, maps)[0]}


def _count(module: Callable, x: Tensor | tuple[Tensor, ...]) -> tuple[int, tuple[Tensor, ...]]:
    """MACs of a forward pass, and what it gives."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: only when needed

    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FVCORE) as counter:
        out = module(x)
    return counter.get_total_flops() // 2, out
