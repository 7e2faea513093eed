"""VSSD: a hierarchical vision backbone of non-causal state space duality (NC-SSD) blocks, with attention in the end.

Shi et al. 2024, "VSSD: Vision Mamba with Non-Causal State Space Duality" (https://arxiv.org/abs/2407.18559), and its
second generation of ICCV 2025, whose blocks have the mixer `LinearNCSSD` (but its base model is the one of 2024).
State-dict keys are those of the published checkpoints, which load as they are.

Shapes: B batch, C channels, H W map; inside, maps are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from .layers.attention import Attention
from .layers.autodiff import recomputed
from .layers.conv import DepthwiseConv
from .layers.conv_stem import get_downsample, get_stem
from .layers.linear_nc_ssd import LinearNCSSD
from .layers.mlp import Mlp
from .layers.nc_ssd import NCSSD
from .layers.norm import add_normed
from .layers.timm_model import PyramidModel, Stage, classify, convert_incoming, reset
from .layers.vssd_files import is_rotations, published_names
from .pretrained import build_model, pretrained_cfgs

__all__ = ["VSSD"]

ATTN_TYPES = ("mamba2", "standard")


@register_notrace_module
class VSSDBlock(nn.Module):
    """x + cpe1(x); + drop_path(attn(norm1(x))); + cpe2(x); + drop_path(mlp(norm2(x))).

    cpe: conditional position encoding, a depthwise convolution. attn: the mixer, NC-SSD or self-attention.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.cpe2 = DepthwiseConv(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), "gelu", drop, **dd)
        self.use_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(self._forward, x) if self.use_checkpoint else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x, tokens = add_normed(self.norm1, x, self.cpe1(x))
        x = x + self.drop_path(self.attn(tokens))
        x, tokens = add_normed(self.norm2, x, self.cpe2(x))
        return x + self.drop_path(self.mlp(tokens))


class VSSD(PyramidModel):
    """VSSD: a stem, stages of `VSSDBlock` with downsampling between them, then norm, pooling and classifier.

    Args:
        in_chans, num_classes: as in timm; with 0 classes the model gives features.
        embed_dim: channels of the first stage, doubled from stage to stage.
        depths: number of blocks, one per stage.
        num_heads: heads of the mixers, one number per stage, for NC-SSD and for attention.
        attn_types: mixer of every stage, "mamba2" (NC-SSD) or "standard" (self-attention).
        mlp_ratio: hidden channels of the MLP per channel.
        drop_rate: dropout in the MLP.
        drop_path_rate: of the last block. It grows linearly from 0 at the first one.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        d_state: of the mixer, see `NCSSD`: one number for all stages, or one per stage (of stages with attention it is
            not used).
        ssd_expansion, ssd_ngroups, ssd_chunk_size: `expand`, `ngroups` and `chunk_size` of `NCSSD`.
        ssd_positive_dA, linear_attn_duality, bidirection: of `NCSSD`, by the same names.
        simple_patch_embed, simple_downsample: take the plainer stem and downsampling of the paper's ablation.
        rmt_patch_embed, rmt_downsample: take the stem and downsampling of the second generation, see `RMTStem`.
        ssd_linear_norm: take the mixer of the second generation, `LinearNCSSD`. It has no causal, bidirectional or
            negative form.
        exp_da, rope: parts of `LinearNCSSD`, which says what is certain about them; an error with another mixer.
        global_pool: of the head, as in timm.
        scan_impl: implementation of the operators, see `ssm_ops`. With "reference", attention is plain PyTorch, too.
        device, dtype: of parameters and buffers, as in PyTorch's layers.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 12, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_types: Sequence[str] = ("mamba2", "mamba2", "mamba2", "standard"),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        use_checkpoint: bool = False,
        d_state: int | Sequence[int] = 64,
        ssd_expansion: int = 2,
        ssd_ngroups: int = 1,
        ssd_chunk_size: int = 256,
        ssd_positive_dA: bool = True,
        linear_attn_duality: bool = True,
        bidirection: bool = False,
        simple_patch_embed: bool = False,
        simple_downsample: bool = False,
        rmt_patch_embed: bool = False,
        rmt_downsample: bool = False,
        ssd_linear_norm: bool = False,
        exp_da: bool = False,
        rope: bool = False,
        global_pool: str = "avg",
        scan_impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not len(depths) == len(num_heads) == len(attn_types):
            raise ValueError(
                f"depths {list(depths)}, num_heads {list(num_heads)} and attn_types {list(attn_types)} must have one "
                "entry per stage"
            )
        d_states = [d_state] * len(depths) if isinstance(d_state, int) else list(d_state)
        if len(d_states) != len(depths):
            raise ValueError(f"d_state={d_state} must be one number, or one per stage of depths {list(depths)}")
        if ssd_linear_norm and (bidirection or not (linear_attn_duality and ssd_positive_dA)):
            raise ValueError(
                "ssd_linear_norm=True is not for causal, bidirectional or negative (ssd_positive_dA) forms"
            )
        if (exp_da or rope) and not ssd_linear_norm:
            raise ValueError(f"exp_da={exp_da} and rope={rope} are parts of ssd_linear_norm=True, which is off")
        self.in_chans = in_chans
        self.num_layers = len(depths)
        self.rmt_downsample = rmt_downsample
        self.rotated = {
            i: n for i, (n, kind) in enumerate(zip(d_states, attn_types, strict=True)) if rope and kind == "mamba2"
        }
        self.dims = [embed_dim * 2**i for i in range(len(depths))]
        self.num_features = self.dims[-1]
        downsample = get_downsample(simple_downsample, rmt_downsample)
        self.patch_embed = get_stem(simple_patch_embed, rmt_patch_embed)(in_chans, self.dims[0], **dd)

        def make_attn(kind: str, dim: int, heads: int, state: int) -> nn.Module:
            if kind not in ATTN_TYPES:
                raise ValueError(f"attn_types: {kind!r} is not one of {', '.join(ATTN_TYPES)}")
            if dim % heads:
                raise ValueError(f"num_heads: {heads} does not divide the {dim} channels of its stage")
            if kind == "standard":
                return Attention(dim, heads, fused=scan_impl != "reference", **dd)
            shared = {
                "d_model": dim,
                "d_state": state,
                "headdim": ssd_expansion * dim // heads,
                "expand": ssd_expansion,
                "ngroups": ssd_ngroups,
                "impl": scan_impl,
                **dd,
            }
            if ssd_linear_norm:
                return LinearNCSSD(**shared, exp_da=exp_da, rope=rope)
            return NCSSD(
                **shared,
                linear_attn_duality=linear_attn_duality,
                ssd_positive_dA=ssd_positive_dA,
                bidirection=bidirection,
                chunk_size=ssd_chunk_size,
            )

        rates = iter(drop_path_rate * (i / max(sum(depths) - 1, 1)) for i in range(sum(depths)))
        self.feature_info = []
        self.layers = nn.ModuleList()
        stages = zip(depths, self.dims, num_heads, attn_types, d_states, strict=True)
        for i, (depth, dim, heads, kind, state) in enumerate(stages):
            blocks = [
                VSSDBlock(dim, make_attn(kind, dim, heads, state), mlp_ratio, drop_rate, next(rates), **dd)
                for _ in range(depth)
            ]
            last = i + 1 == len(depths)
            self.layers.append(Stage(blocks, nn.Identity() if last else downsample(dim, **dd)))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks"})

        self.norm = nn.LayerNorm(self.dims[-1], **dd)
        self._set_classifier(num_classes, global_pool, **dd)
        self.init_weights(needs_reset=False)
        self.set_grad_checkpointing(use_checkpoint)
        self.register_load_state_dict_pre_hook(convert_incoming)

    def _init_layers(self) -> None:
        # A mixer is made before the block around it. Drawn again, all values come in the order of `init_weights`, so
        # that a seed gives the same ones on either way.
        self.layers.apply(reset)
        super()._init_layers()

    # ---- forward ----

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map -> logits, or with `pre_logits` what the linear layer sees, (B, head_hidden_size)."""
        x = self.pool(self.norm(x))
        return x if pre_logits else classify(self.head, x, self.pool.is_identity(), self.output_fmt)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W), any H and W (from 4 on with the simple stem) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    # ---- what timm expects of a model ----

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates, from the stem to the head."""
        with_previous = (99999,)  # timm's sign for "in the group of what comes before"
        blocks = [
            (r"^layers\.(\d+)\.downsample", with_previous),
            (r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", with_previous),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would push to a meaningless value (1-D ones are known anyway)."""
        leaves = ("A_log", "D", "dt_bias")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in leaves}

    # ---- checkpoints ----

    def is_computed(self, name: str) -> bool:
        """Whether a file's entry is no weight of this model, but a table that the model computes."""
        return is_rotations(name, self.rotated)

    def convert_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published entries, in any of their spellings, brought to this model's. Raises ValueError for tables of
        rotations other than those that the model computes."""
        return published_names(state_dict, self.rotated, self.rmt_downsample)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: VSSD) -> dict[str, Tensor]:
    """The weights of a published file, by the names of this model."""
    return model.convert_state_dict(state_dict.get("model", state_dict))


# ---- variants ----

_ICCV2025 = {
    "attn_types": ("mamba2", "mamba2", "mamba2", "standard"),
    "mlp_ratio": 3.0,
    "ssd_expansion": 1,
    **dict.fromkeys(("rmt_patch_embed", "rmt_downsample", "ssd_linear_norm", "exp_da", "rope"), True),
}

VARIANTS = {
    "vssd_micro": {
        "embed_dim": 48,
        "depths": (2, 2, 8, 4),
        "num_heads": (2, 4, 8, 16),
        "d_state": 48,
        # what the published weights were trained with; the published yaml says 0.1, in a place that is not read
        "drop_path_rate": 0.2,
    },
    "vssd_tiny": {
        "embed_dim": 64,
        "depths": (2, 4, 8, 4),
        "num_heads": (2, 4, 8, 16),
        "d_state": 64,
        "drop_path_rate": 0.2,
    },
    "vssd_small": {
        "embed_dim": 64,
        "depths": (3, 4, 21, 5),
        "num_heads": (2, 4, 8, 16),
        "d_state": 64,
        "drop_path_rate": 0.4,
    },
    "vssd_base": {
        "embed_dim": 96,
        "depths": (3, 4, 21, 5),
        "num_heads": (3, 6, 12, 24),
        "d_state": 64,
        "drop_path_rate": 0.6,
    },
    "vssd_nano": {
        "embed_dim": 32,
        "depths": (1, 2, 1),
        "num_heads": (2, 4, 8),
        "attn_types": ("mamba2", "mamba2", "standard"),
        "d_state": 16,
        "drop_path_rate": 0.05,
    },
    "vssd_tiny_iccv2025": {
        **_ICCV2025,
        "embed_dim": 96,
        "depths": (2, 2, 8, 2),
        "num_heads": (4, 4, 8, 16),
        "d_state": (12, 24, 48, 64),
        "drop_path_rate": 0.2,
    },
    "vssd_small_iccv2025": {
        **_ICCV2025,
        "embed_dim": 96,
        "depths": (2, 4, 15, 4),
        "num_heads": (4, 4, 8, 16),
        "d_state": (12, 24, 48, 64),
        "drop_path_rate": 0.4,
    },
    "vssd_nano_iccv2025": {
        **_ICCV2025,
        "embed_dim": 32,
        "depths": (1, 2, 1),
        "num_heads": (2, 4, 8),
        "attn_types": ("mamba2", "mamba2", "standard"),
        "d_state": (8, 16, 16),
        "drop_path_rate": 0.05,
    },
}
"""Arguments of the published models and of two for small images, by registry name."""

_OF_2024 = [name for name in VARIANTS if not name.endswith("_iccv2025")]
_OF_2025 = [name for name in VARIANTS if name.endswith("_iccv2025")]


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head",
        "paper_ids": "arXiv:2407.18559",
        **kwargs,
    }


_RMT_STEM = {"first_conv": "patch_embed.proj.0"}
_NANO = {"input_size": (3, 32, 32), "pool_size": (2, 2), "num_classes": 10}

default_cfgs = generate_default_cfgs(
    pretrained_cfgs(_OF_2024, _cfg())
    | pretrained_cfgs(_OF_2025, _cfg(**_RMT_STEM))
    | {"vssd_nano": _cfg(**_NANO), "vssd_nano_iccv2025": _cfg(**_RMT_STEM, **_NANO)}
)


def _create_vssd(variant: str, pretrained: bool, **kwargs) -> VSSD:
    arguments = VARIANTS[variant] | kwargs
    return build_model(
        VSSD,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"},
        **arguments,
    )


@register_model
def vssd_micro(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_micro", pretrained, **kwargs)


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_tiny", pretrained, **kwargs)


@register_model
def vssd_small(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_small", pretrained, **kwargs)


@register_model
def vssd_base(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_base", pretrained, **kwargs)


@register_model
def vssd_nano(pretrained: bool = False, **kwargs) -> VSSD:
    """For images of 32 to 64 pixels: three stages, 8x8 tokens at 32 pixels."""
    return _create_vssd("vssd_nano", pretrained, **kwargs)


@register_model
def vssd_tiny_iccv2025(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_tiny_iccv2025", pretrained, **kwargs)


@register_model
def vssd_small_iccv2025(pretrained: bool = False, **kwargs) -> VSSD:
    return _create_vssd("vssd_small_iccv2025", pretrained, **kwargs)


@register_model
def vssd_nano_iccv2025(pretrained: bool = False, **kwargs) -> VSSD:
    """As `vssd_nano`, with the parts of the second generation."""
    return _create_vssd("vssd_nano_iccv2025", pretrained, **kwargs)
