"""VMamba: a hierarchical vision backbone of visual state-space (VSS) blocks.

Liu et al. 2024, "VMamba: Visual State Space Model" (https://arxiv.org/abs/2401.10166); original code, MIT licence:
https://github.com/MzeroMiko/VMamba. State-dict keys are those of the original code: its checkpoints load as they are.

Shapes: B batch, C channels, H W map; inside, (B, H, W, C) for norm "ln" and (B, C, H, W) for "ln2d" and "bn".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_module, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .layers.autodiff import recomputed, to_channels_last
from .layers.forward_type import mixer_family
from .layers.mlp import Mlp
from .layers.norm import add_normed, get_norm, is_channel_first, normed
from .layers.ss2d import SS2D
from .layers.ss2d_m0 import SS2DM0
from .layers.ss2d_xv import SS2DXv
from .layers.stem import make_downsample, make_stem, stem_grid, stem_stride
from .layers.timm_model import PyramidModel, Stage, classify, convert_incoming
from .pretrained import build_model, pretrained_cfgs

__all__ = ["VSSM"]

_MIXERS = {"v": SS2D, "xv": SS2DXv, "m0": SS2DM0}


@register_notrace_module
class VSSBlock(nn.Module):
    """x + drop_path(op(norm(x))), then x + drop_path(mlp(norm2(x))); `op` or `mlp` may be absent (None).

    op: the mixer, a 2-D selective scan.
    """

    def __init__(
        self,
        op: nn.Module | None,
        mlp: nn.Module | None,
        dim: int,
        norm_layer: str,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        norm = partial(get_norm(norm_layer), device=device, dtype=dtype)
        if op is not None:
            self.norm = norm(dim)
            self.op = op
        self.drop_path = DropPath(drop_path)
        if mlp is not None:
            self.norm2 = norm(dim)
            self.mlp = mlp
        self.has_op, self.has_mlp = op is not None, mlp is not None
        self.use_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._forward, x) if self.use_checkpoint else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        branch = None
        if self.has_op:
            branch = self.drop_path(self.op(normed(self.norm, x)))
        if self.has_mlp:
            x, tokens = add_normed(self.norm2, x, branch)
            branch = self.drop_path(self.mlp(tokens))
        return x if branch is None else x + branch


class ClassifierHead(nn.Module):
    """norm -> pool -> dropout -> linear. The model sets `pool` and the linear layer, `head`."""

    def __init__(self, norm: nn.Module, drop_rate: float, output_fmt: str):
        super().__init__()
        self.output_fmt = output_fmt
        self.norm = norm
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pool(self.norm(x)))
        return x if pre_logits else classify(self.head, x, self.pool.is_identity(), self.output_fmt)


class VSSM(PyramidModel):
    """VMamba: a stem, stages of `VSSBlock` with downsampling between them, and a head of norm, pooling and classifier.

    Args:
        patch_size: stride of the stem in pixels.
        in_chans, num_classes: as in timm; with 0 classes the model gives features.
        depths: number of blocks, one per stage.
        dims: channels, one number per stage; or the channels of the first stage, doubled from stage to stage.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate, ssm_init,
            forward_type: of the mixer, see `SS2D`, `SS2DXv`, `SS2DM0`; forward_type chooses one of the three. With
            ssm_ratio <= 0 blocks have no mixer.
        mlp_ratio, mlp_act_layer, mlp_drop_rate, gmlp: of the MLP. With mlp_ratio <= 0 blocks have no MLP.
        drop_path_rate: of the last block. It grows linearly from 0 at the first one.
        patch_norm: whether the stem has norms.
        norm_layer: "ln" for LayerNorm on maps (B, H, W, C); "ln2d" for LayerNorm or "bn" for BatchNorm on (B, C, H, W).
        downsample_version: "v1" merges patches as Swin does, "v2" is a 2x2 convolution of stride 2, "v3" a 3x3 one,
            "none" keeps the resolution.
        patchembed_version: stem of one convolution, "v1", or of two that overlap, "v2".
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        posembed: add a learned absolute position embedding. It has the size for images of `imgsize` pixels, and is
            resized for others.
        global_pool, drop_rate: of the head, as in timm.
        ssm_initial_state: `initial_state` of `SS2DM0`; an error with another mixer.
        scan_impl: implementation of the scans, see `ssm_ops`.
        device, dtype: of parameters and buffers, as in PyTorch's layers.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "ln",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int = 224,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        ssm_initial_state: bool = False,
        scan_impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"dims {dims} and depths {list(depths)} must have one entry per stage")
        mixer = _MIXERS[mixer_family(forward_type)]
        if ssm_initial_state:
            if mixer is not SS2DM0:
                raise ValueError(f"ssm_initial_state is an option of forward_type m0, not of {forward_type!r}")
            mixer = partial(SS2DM0, initial_state=True)
        self.in_chans = in_chans
        self.num_layers = len(depths)
        self.dims = dims
        self.num_features = dims[-1]
        self.channel_first = is_channel_first(norm_layer)
        self.output_fmt = "NCHW" if self.channel_first else "NHWC"

        self.pos_embed = None
        if posembed:
            grid = stem_grid(patchembed_version, patch_size, imgsize)
            self.pos_embed = nn.Parameter(torch.empty(1, dims[0], grid, grid, **dd))
        self.patch_embed = make_stem(patchembed_version, in_chans, dims[0], patch_size, patch_norm, norm_layer, **dd)

        def make_block(dim: int, drop_path: float) -> VSSBlock:
            op = mlp = None
            if ssm_ratio > 0:
                op = mixer(
                    d_model=dim,
                    d_state=ssm_d_state,
                    ssm_ratio=ssm_ratio,
                    dt_rank=ssm_dt_rank,
                    act_layer=ssm_act_layer,
                    d_conv=ssm_conv,
                    conv_bias=ssm_conv_bias,
                    dropout=ssm_drop_rate,
                    initialize=ssm_init,
                    forward_type=forward_type,
                    channel_first=self.channel_first,
                    impl=scan_impl,
                    **dd,
                )
            if mlp_ratio > 0:
                hidden = int(dim * mlp_ratio)
                mlp = Mlp(dim, hidden, mlp_act_layer, mlp_drop_rate, gmlp, self.channel_first, **dd)
            return VSSBlock(op, mlp, dim, norm_layer, drop_path, **dd)

        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        stride = stem_stride(patchembed_version, patch_size)
        self.feature_info = []
        self.layers = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = [make_block(dim, next(rates)) for _ in range(depth)]
            last = i + 1 == len(dims)
            down = nn.Identity() if last else make_downsample(downsample_version, dim, dims[i + 1], norm_layer, **dd)
            self.layers.append(Stage(blocks, down))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"layers.{i}.blocks"})
            stride *= 1 if downsample_version == "none" else 2

        self.classifier = ClassifierHead(get_norm(norm_layer)(dims[-1], **dd), drop_rate, self.output_fmt)
        self._set_classifier(num_classes, global_pool, **dd)
        self.init_weights(needs_reset=False)
        self.set_grad_checkpointing(use_checkpoint)
        self.register_load_state_dict_pre_hook(convert_incoming)

    def _top(self) -> nn.Module:
        return self.classifier

    def reset_parameters(self) -> None:
        """The position embedding."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    # ---- forward ----

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> first tokens in the model's layout."""
        self.check_images(x)
        if self.channel_first:
            x = _in_fast_order(x)
        x = super().forward_stem(x)
        if self.pos_embed is not None:
            size = x.shape[2:] if self.channel_first else x.shape[1:3]
            pos_embed = resize_pos_embed(self.pos_embed, size)
            x = x + (pos_embed if self.channel_first else pos_embed.permute(0, 2, 3, 1))
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or with `pre_logits` what the linear layer sees, (B, head_hidden_size)."""
        return self.classifier(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W), any H and W from `patch_size` on -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    # ---- what timm expects of a model ----

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates, from the stem to the head."""
        with_previous = (99999,)  # timm's sign for "in the group of what comes before"
        blocks = [
            (r"^layers\.(\d+)\.downsample", with_previous),
            (r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^classifier\.norm", with_previous),
        ]
        return {"stem": r"^patch_embed|^pos_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would push to a meaningless value (1-D ones are known anyway)."""
        leaves = ("A_logs", "Ds", "dt_projs_bias", "pos_embed")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in leaves}

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published names and shapes, old ones included, brought to this model's."""
        return checkpoint_filter_fn(state_dict, self)


@torch.fx.wrap
def _in_fast_order(x: Tensor) -> Tensor:
    """The same map, in whose memory all layers are faster and which they keep: on the CPU (B, H, W, C)."""
    return to_channels_last(x) if x.device.type == "cpu" else x


@torch.fx.wrap
def resize_pos_embed(pos_embed: Tensor, size: Sequence[int]) -> Tensor:
    """(1, C, h, w) -> (1, C, *size), bicubic."""
    if tuple(pos_embed.shape[2:]) == tuple(size):
        return pos_embed
    return F.interpolate(pos_embed, size=tuple(size), mode="bicubic", align_corners=False)


# ---- checkpoints ----

_RENAMES = [
    # the first public checkpoints ("v0")
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
    # the one-file edition of the original code
    (re.compile(r"\.op\.(x_proj|dt_projs)\.weight$"), r".op.\1_weight"),
]
_ONE_FILE_MERGING = [  # its patch merging is a Sequential(merge, norm, linear)
    (re.compile(r"^(layers\.\d+\.downsample)\.1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.downsample)\.2\."), r"\1.reduction."),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring a published state dict or file to today's names and to the shapes of `model`; one in this form stays as
    it is.

    Old names are replaced, 1x1 convolution weights become 2-D, stacked projections 3-D, and the position embedding is
    resized to the model's grid. Nothing is added or left out.
    """
    state_dict = state_dict.get("model", state_dict)
    own = model.state_dict()
    merges = any(name.endswith(".downsample.reduction.weight") for name in own)
    renames = _RENAMES + (_ONE_FILE_MERGING if merges else [])
    converted = {}
    for name, value in state_dict.items():
        for pattern, replacement in renames:
            name = pattern.sub(replacement, name)
        target = own.get(name)
        if target is not None and value.shape != target.shape:
            if name == "pos_embed":
                value = resize_pos_embed(value, target.shape[2:])
            elif value.numel() == target.numel() and _same_but_for_layout(name, value, target):
                value = value.reshape(target.shape)
        converted[name] = value
    return converted


def _same_but_for_layout(name: str, value: Tensor, target: Tensor) -> bool:
    stacked = name.endswith(("x_proj_weight", "dt_projs_weight")) and value.shape[1:] == target.shape[2:]
    return stacked or (value.dim() == 4 and value.shape == (*target.shape, 1, 1))


# ---- variants ----

_VANILLA = {
    "forward_type": "v0",
    "ssm_d_state": 16,
    "mlp_ratio": 0.0,
    "norm_layer": "ln",
    "downsample_version": "v1",
    "patchembed_version": "v1",
}
_V2 = {
    "forward_type": "v05_noz",
    "ssm_d_state": 1,
    "ssm_conv_bias": False,
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}
_M2 = {
    "forward_type": "m0_noz",
    "ssm_d_state": 64,
    "ssm_ratio": 1.0,
    "ssm_act_layer": "gelu",
    "ssm_conv_bias": False,
    "ssm_init": "v2",
    "norm_layer": "ln",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}

VARIANTS = {
    "vanilla_vmamba_tiny": {**_VANILLA, "depths": (2, 2, 9, 2), "dims": 96, "drop_path_rate": 0.2},
    "vanilla_vmamba_small": {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 96, "drop_path_rate": 0.3},
    "vanilla_vmamba_base": {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 128, "drop_path_rate": 0.6},
    "vmamba_tiny_s2l5": {**_V2, "depths": (2, 2, 5, 2), "dims": 96, "ssm_ratio": 2.0, "drop_path_rate": 0.2},
    "vmamba_small_s2l15": {**_V2, "depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0, "drop_path_rate": 0.3},
    "vmamba_base_s2l15": {**_V2, "depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0, "drop_path_rate": 0.6},
    "vmamba_tiny_s1l8": {**_V2, "depths": (2, 2, 8, 2), "dims": 96, "ssm_ratio": 1.0, "drop_path_rate": 0.2},
    "vmamba_small_s1l20": {**_V2, "depths": (2, 2, 20, 2), "dims": 96, "ssm_ratio": 1.0, "drop_path_rate": 0.3},
    "vmamba_base_s1l20": {**_V2, "depths": (2, 2, 20, 2), "dims": 128, "ssm_ratio": 1.0, "drop_path_rate": 0.5},
    "vmamba_tiny_0220": {
        **_V2,
        "forward_type": "v2",
        "norm_layer": "ln",
        "depths": (2, 2, 4, 2),
        "dims": 96,
        "ssm_ratio": 2.0,
        "drop_path_rate": 0.2,
    },
    "vmamba_tiny_m2": {**_M2, "depths": (2, 2, 4, 2), "dims": 96, "drop_path_rate": 0.2},
    "vmamba_small_m2": {**_M2, "depths": (2, 2, 12, 2), "dims": 96, "drop_path_rate": 0.3},
    "vmamba_base_m2": {**_M2, "depths": (2, 2, 12, 2), "dims": 128, "drop_path_rate": 0.3},
    "vmamba_nano": {**_V2, "depths": (1, 2, 1), "dims": 32, "ssm_ratio": 1.0, "drop_path_rate": 0.05},
}
"""Arguments of the published models, by registry name."""


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
        "paper_ids": "arXiv:2401.10166",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    pretrained_cfgs(VARIANTS, _cfg()) | {"vmamba_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), num_classes=10)}
)


def _create_vssm(variant: str, pretrained: bool, **kwargs) -> VSSM:
    arguments = VARIANTS[variant] | kwargs
    return build_model(
        VSSM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"},
        **arguments,
    )


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vanilla_vmamba_tiny", pretrained, **kwargs)


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vanilla_vmamba_small", pretrained, **kwargs)


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vanilla_vmamba_base", pretrained, **kwargs)


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_tiny_s2l5", pretrained, **kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_small_s2l15", pretrained, **kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_base_s2l15", pretrained, **kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_tiny_s1l8", pretrained, **kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_small_s1l20", pretrained, **kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_base_s1l20", pretrained, **kwargs)


@register_model
def vmamba_tiny_0220(pretrained: bool = False, **kwargs) -> VSSM:
    """Gated, of February 2024."""
    return _create_vssm("vmamba_tiny_0220", pretrained, **kwargs)


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_tiny_m2", pretrained, **kwargs)


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_small_m2", pretrained, **kwargs)


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs) -> VSSM:
    return _create_vssm("vmamba_base_m2", pretrained, **kwargs)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs) -> VSSM:
    """For images of 32 to 64 pixels: three stages, 8x8 tokens at 32 pixels."""
    return _create_vssm("vmamba_nano", pretrained, **kwargs)
