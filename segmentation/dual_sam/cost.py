"""What Dual-SAM costs for one image, both of whose views pass the encoder."""

import copy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from ssm_mm.backbone import is_ours
from ssm_mm.flops import DenseCard, Part
from ssm_models import model_card
from ssm_train.common.errors import UserError


def dual_card(cfg: Config, image: tuple[int, int]) -> DenseCard:
    """Parameters and multiply-accumulates (MACs) by part, on the meta device.

    MACs are those of convolutions and products of matrices; backbones of the zoo have the scans of `model_card`, too.
    The head's are those of both decoders, as in training; a prediction needs the first alone.

    Args:
        image: (height, width).

    Raises:
        UserError: an image whose sides are not multiples of the model's `size_divisor`.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton: only when needed

    divisor = cfg.model.size_divisor
    if min(image) < 1 or image[0] % divisor or image[1] % divisor:
        raise UserError(f"an image of {image[1]}x{image[0]} pixels: both must be multiples of {divisor}")
    ours = is_ours(cfg.model.backbone)
    with torch.device("meta" if ours or cfg.model.backbone.type == "SAMEncoder" else "cpu"):
        model = MODELS.build(copy.deepcopy(cfg.model)).to("meta").eval()
    macs: dict[str, int] = {}

    def counted(name: str, *inputs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = getattr(model, name)(*inputs)
        macs[name] = counter.get_total_flops() // 2
        return out

    with torch.device("meta"), torch.no_grad():
        views = torch.empty(2, 3, *image)
        maps = counted("backbone", views)
        if ours:
            macs["backbone"] = 2 * model_card(model.backbone, (3, *image)).macs_official
        if model.with_neck:
            maps = counted("neck", maps)
        *maps, bottom = (each[:1] for each in maps)
        counted("prompt", views[:1], maps, maps)
        counted("decode_head", ((maps, bottom), (maps, bottom)))
    sizes = {name: sum(value.numel() for value in child.parameters()) for name, child in model.named_children()}
    return DenseCard(tuple(image), tuple(Part(name, sizes[name], macs[name]) for name in macs))
