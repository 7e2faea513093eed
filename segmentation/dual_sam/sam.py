"""SAM's image encoder (timm's `samvit_base_patch16`) for two views at once, with the parts of it that are trained.

Legend: B pairs of images, H W pixels, C = 768 channels, h = H / 16, w = W / 16.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import checkpoint_filter_fn
from torch import Tensor, nn

from segmentation.dual_sam.adapter import AdaptedMlp
from segmentation.dual_sam.lora import LoRAQKV
from ssm_models.checkpoint import CheckpointError, describe_difference, read_checkpoint
from ssm_train.common.errors import UserError


class SAMEncoder(nn.Module):
    """SAM's encoder with weights that stay, and LoRA and adapters that learn.

    Args:
        checkpoint: SAM's own file (sam_vit_b_01ec64.pth) or timm's; None builds random weights, which only a
            checkpoint of the whole segmentor can replace: a training is refused.
        img_size: pixels that the position embeddings are for, to which those of a checkpoint are resized; images may
            have other sizes.
        lora_rank: of the additions to q and v.
        adapter_dim: inner width of the adapters.
        frozen: False trains SAM's own weights, too.
        model_args: further arguments of timm's model, for other sizes than ViT-B.

    Raises:
        UserError: a checkpoint that cannot be read or is not of this encoder.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        img_size: int = 512,
        lora_rank: int = 4,
        adapter_dim: int = 48,
        frozen: bool = True,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # SAM's epsilon, where timm has 1e-5
        arguments = {"norm_layer": partial(nn.LayerNorm, eps=1e-6), **(model_args or {})}
        self.sam = timm.create_model("samvit_base_patch16", img_size=img_size, num_classes=0, **arguments)
        self._learns_from_nothing = frozen and checkpoint is None
        if checkpoint is not None:
            load_sam(self.sam, checkpoint)
        self.sam.requires_grad_(not frozen)
        dim, depth = self.sam.embed_dim, len(self.sam.blocks)
        for block in self.sam.blocks:
            block.attn.qkv = LoRAQKV(block.attn.qkv, lora_rank)
            block.mlp = AdaptedMlp(block.mlp, dim, adapter_dim)
        self.taps = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]

    def init_weights(self) -> None:
        """mmengine calls it when a training begins. UserError if SAM's weights are random and would stay so."""
        if self._learns_from_nothing:
            raise UserError(
                "SAM's encoder has no weights and is frozen: --cfg-options model.backbone.checkpoint="
                "sam_vit_b_01ec64.pth names a file, model.backbone.frozen=False trains it from random ones"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(2 B, 3, H, W), images before their gamma copies -> maps after every quarter of the blocks (2 B, C, h, w),
        and the neck's (2 B, 256, h, w)."""
        bottom, maps = self.sam.forward_intermediates(x, indices=self.taps)
        return (*maps, bottom)


def load_sam(encoder: nn.Module, path: str | Path) -> None:
    """Load weights of SAM or timm, strictly, into timm's encoder; embeddings of other image sizes are resized.

    Of SAM's file the prompt encoder and the mask decoder are left out. Raises UserError.
    """
    try:
        weights = checkpoint_filter_fn(read_checkpoint(path), encoder)
    except CheckpointError as error:
        raise UserError(f"SAM's encoder: {error}") from error
    own = encoder.state_dict()
    weights = {
        name: _resized(value, own[name].shape) if name in own and name.endswith(_EMBEDDINGS) else value
        for name, value in weights.items()
    }
    difference = describe_difference(weights, own)
    if difference:
        raise UserError(f"checkpoint {path} does not fit SAM's encoder: {difference}")
    encoder.load_state_dict(weights)


_EMBEDDINGS = ("pos_embed", "rel_pos_h", "rel_pos_w")


def _resized(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Bilinear, as the original does: positions (1, h, w, C) by height and width, relative ones (2 h - 1, C) by
    their first dimension. What has no fitting channels stays as it is, for the comparison to name."""
    if value.shape == torch.Size(shape) or value.shape[-1] != shape[-1] or value.dim() != len(shape):
        return value
    if value.dim() == 4:
        resized = F.interpolate(value.permute(0, 3, 1, 2), shape[1:3], mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1)
    return F.interpolate(value[None, None], tuple(shape), mode="bilinear", align_corners=False)[0, 0]
