"""Vision Mamba (Vim): a plain vision backbone, a sequence of patches through bidirectional Mamba blocks.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(https://arxiv.org/abs/2401.09417); original code, Apache 2.0: https://github.com/hustvl/Vim. State-dict keys are those
of the original code: its checkpoints load as they are.

Shapes: B batch, C channels, L = patches + class tokens; h w grid of the patches, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, create_classifier, to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor

from .layers.autodiff import recomputed
from .layers.bimamba import BiMamba
from .layers.norm import RMSNorm, add_normed
from .layers.timm_model import POOLS, convert_incoming, init_linear
from .layers.vim_grid import bring_to_grid
from .layers.vim_tokens import TokenModel, at_rest
from .pretrained import build_model, pretrained_cfgs

__all__ = ["VisionMamba"]

POOL_TYPES = ("none", "mean", "max", "all")
# timm's names for the same
_TIMM_POOLS = {"mean": "avg", "all": ""}


class VimBlock(nn.Module):
    """residual = residual + drop_path(hidden), then hidden = mixer(norm(residual)).

    The addition comes first, so what drop_path drops is the output of the *previous* block.
    """

    def __init__(self, dim: int, mixer: nn.Module, norm: nn.Module, drop_path: float, residual_in_fp32: bool):
        super().__init__()
        self.mixer = mixer
        self.norm = norm
        self.drop_path = DropPath(drop_path)
        self.residual_in_fp32 = residual_in_fp32
        self.use_checkpoint = False

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, C) and the residual stream (B, L, C), None before the first block -> both again."""
        if self.use_checkpoint:
            return recomputed(self._forward, hidden, residual)
        return self._forward(hidden, residual)

    def _forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        branch = None
        if residual is None:
            residual = hidden
        else:
            branch = self.drop_path(hidden)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if isinstance(self.norm, RMSNorm):
            residual, tokens = add_normed(self.norm, residual, branch)
        else:
            residual = residual if branch is None else residual + branch
            tokens = self.norm(residual.to(self.norm.weight.dtype))  # LayerNorm wants its input in their dtype
        return self.mixer(tokens), residual


class VisionMamba(TokenModel):
    """Vim: patches and class tokens as one sequence, blocks with a bidirectional scan over it, a norm and a classifier.

    Args:
        img_size: size in pixels, a number or (H, W), of the images that the position embedding is learned for. Images
            of other sizes work, too.
        patch_size, stride: size of a patch, and the way from one patch to the next, in pixels.
        depth: number of blocks.
        embed_dim: C.
        d_state, bimamba_type, if_divide_out, init_layer_scale: of the mixers, see `BiMamba`.
        in_chans, num_classes: as in timm; with 0 classes the model gives features.
        ssm_cfg: further arguments of the mixers, by name.
        drop_rate: dropout after the position embedding.
        drop_path_rate: of the output of the last block. It grows linearly from 0.
        norm_epsilon: of all norms.
        rms_norm: whether norms are RMSNorm; else LayerNorm.
        residual_in_fp32: keep the residual stream in float32 (or float64), whatever the dtype of the weights.
        pt_hw_seq_len: side of the grid on which rotary positions are 0, 1, 2, ...; other grids are scaled to it.
        if_bidirectional: run blocks in pairs, the second one over the reversed sequence, and add their results.
        final_pool_type: pooling of a model without class tokens. "none" takes the last patch, "mean" the mean of all
            patches, "max" the highest logits of all patches; "all" gives the logits of every token, (B, L, classes).
            The names of `global_pool` are understood, too.
        if_abs_pos_embed: add a learned position embedding.
        if_rope: rotate the hidden state by rotary positions before every block; if_rope_residual: with it the residual
            stream.
        flip_img_sequences_ratio: probability that the sequence is reversed in training. From 1 on it always is, in
            evaluation, too.
        if_bimamba: the same as bimamba_type="v1".
        if_cls_token: whether there are class tokens.
        use_double_cls_token, use_middle_cls_token: where they are: one at the head and one at the tail, averaged after
            the blocks; or else one in the middle; with neither flag one at the head.
        cls_mode: the place by its name, in place of the two flags: "middle", "head", "tail", "double", or "random"
            (anywhere in training, in the middle in evaluation).
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        global_pool: the pooling by timm's names, with or without class tokens. "token" takes the class tokens. "avg" or
            "mean", "max" (the highest logits, as published), "avgmax" and "catavgmax" pool the patches. "none" takes
            the last patch. "" or "all" keeps every token. None: the class tokens where there are any, else
            `final_pool_type`.
        scan_impl: implementation of the scan, see `BiMamba`.
        device, dtype: of parameters and buffers, as in PyTorch's layers.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        ssm_cfg: Mapping[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        residual_in_fp32: bool = True,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        cls_mode: str | None = None,
        use_checkpoint: bool = False,
        global_pool: str | None = None,
        scan_impl: str = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd = {"device": device, "dtype": dtype}
        if if_bidirectional and depth % 2:
            raise ValueError(f"depth={depth} must be even with if_bidirectional, which runs blocks in pairs")
        if cls_mode is None:
            cls_mode = "double" if use_double_cls_token else "middle" if use_middle_cls_token else "head"
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            cls_mode=cls_mode,
            if_cls_token=if_cls_token,
            if_abs_pos_embed=if_abs_pos_embed,
            drop_rate=drop_rate,
            if_rope=if_rope,
            pt_hw_seq_len=pt_hw_seq_len,
            flip_img_sequences_ratio=flip_img_sequences_ratio,
            **dd,
        )
        self.num_features = self.embed_dim = embed_dim
        self.depth = depth
        self.if_bidirectional = if_bidirectional
        self.rope_residual = if_rope_residual
        pool = self._known_pool(final_pool_type)
        if if_cls_token or global_pool is not None:
            pool = self._known_pool("token" if global_pool is None else global_pool)
        self._set_classifier(num_classes, pool, **dd)

        def norm() -> nn.Module:
            return (RMSNorm if rms_norm else nn.LayerNorm)(embed_dim, norm_epsilon, **dd)

        # a block drops what the block before it made: the published schedule, shifted by one
        rates = [0.0, *(drop_path_rate * i / (depth - 1) for i in range(depth - 1))]
        self.layers = nn.ModuleList(
            VimBlock(
                embed_dim,
                BiMamba(
                    embed_dim,
                    d_state=d_state,
                    bimamba_type="v1" if if_bimamba else bimamba_type,
                    if_divide_out=if_divide_out,
                    init_layer_scale=init_layer_scale,
                    impl=scan_impl,
                    **dd,
                    **(ssm_cfg or {}),
                ),
                norm(),
                rate,
                residual_in_fp32,
            )
            for rate in rates
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm_f = norm()
        self.feature_info = [{"num_chs": embed_dim, "reduction": stride, "module": f"layers.{i}"} for i in range(depth)]
        self.init_weights(needs_reset=False)
        self.set_grad_checkpointing(use_checkpoint)
        self.register_load_state_dict_pre_hook(convert_incoming)

    def _init_layers(self) -> None:
        for part in self.children():
            init_linear(part)  # the classifier, which a backbone has not
        for block in self.layers:
            with torch.no_grad():
                block.mixer.out_proj.weight /= math.sqrt(self.depth)  # GPT-2's, for one addition per block

    # ---- forward ----

    def forward_blocks(
        self,
        x: Tensor,
        order: Tensor | None,
        grid: tuple[int, int],
        wanted: Sequence[int] = (),
        last: int | None = None,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """The blocks up to number `last`.

        Returns:
            hidden state and residual stream after them, whose sum is the result, and those pairs after the blocks
            `wanted`; all (B, L, C) and in the resting order.
        """
        step = 2 if self.if_bidirectional else 1
        hidden, residual, taps = x, None, []
        for i in range(0, len(self.layers) if last is None else last + 1, step):
            if self.rope is not None:
                hidden = self._rotate(hidden, order, grid)
                if self.rope_residual and residual is not None:
                    residual = self._rotate(residual, order, grid)
            before = (hidden, residual)
            hidden, residual = self.layers[i](*before)
            if self.if_bidirectional:
                back = self.layers[i + 1](*(None if t is None else t.flip(1) for t in before))
                hidden, residual = hidden + back[0].flip(1), residual + back[1].flip(1)
            taps += [(at_rest(hidden, order), at_rest(residual, order)) for j in range(i, i + step) if j in wanted]
        return at_rest(hidden, order), at_rest(residual, order), taps

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> normed tokens (B, L, C), class tokens included."""
        hidden, residual, _ = self.forward_blocks(*self.forward_stem(x))
        return self._final_norm(residual + self.drop_path(hidden))

    def _final_norm(self, x: Tensor) -> Tensor:
        """Of the residual stream; RMSNorm brings its result to the dtype of the weights itself."""
        return self.norm_f(x if isinstance(self.norm_f, RMSNorm) else x.to(self.layers[0].norm.weight.dtype))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (B, L, C) -> logits (B, num_classes); of every token (B, L, num_classes) without pooling.

        With `pre_logits` what comes out of a model without the linear layer: (B, head_hidden_size), or every token.
        """
        if self.global_pool == "max" and not pre_logits:
            return self.head(self._split(x)[0]).amax(1)
        x = self._pool(x)
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, head_hidden_size); without pooling the same."""
        if self.global_pool == "":
            return x
        patches, tokens = self._split(x)
        if self.global_pool == "token":
            return tokens.mean(1)
        if self.global_pool == "none":
            return patches[:, -1]
        return self.pool(patches.unsqueeze(1))  # a map of height 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W), any H and W from `patch_size` on -> as `forward_head`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The residual stream after blocks; with `if_bidirectional` after their pair. In the dtype of the weights.

        Args:
            indices: the last n blocks, the given ones, or all.
            return_prefix_tokens: beside every map also its class tokens, (B, number, C).
            norm: the final norm on every map.
            stop_early: do not run the blocks after the last wanted one.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C), without the class tokens in both.
            intermediates_only: leave out the final features.

        Returns:
            A list of contiguous maps, or (final features as `forward_features`, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not one of NCHW, NLC")
        wanted, last = feature_take_indices(len(self.layers), indices)
        x, order, grid = self.forward_stem(x)
        hidden, residual, taps = self.forward_blocks(x, order, grid, wanted, last if stop_early else None)
        intermediates = []
        for pair in taps:
            patches, tokens = self._split(self._final_norm(sum(pair)) if norm else self._stream(*pair))
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid)
            patches = patches.contiguous()
            intermediates.append((patches, tokens) if return_prefix_tokens else patches)
        if intermediates_only:
            return intermediates
        return self._final_norm(residual + self.drop_path(hidden)), intermediates

    def _stream(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The residual stream behind a block in the dtype of the weights, as the norms give it."""
        return (residual + hidden).to(self.layers[0].norm.weight.dtype)

    # ---- what timm expects of a model ----

    def _known_pool(self, name: str) -> str:
        """The pooling of this name, which may be another name for it. Raises ValueError if there is none."""
        legal = dict.fromkeys((*POOL_TYPES, *POOLS) if self.cls_mode == "none" else ("token", *POOL_TYPES, *POOLS))
        if name not in legal and name != "":
            raise ValueError(f"pooling {name!r} is not one of {', '.join(legal)}")
        return _TIMM_POOLS.get(name, name)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer, and a new pooling if one is given; without classes the pooled features come out."""
        pool = self.global_pool if global_pool is None else self._known_pool(global_pool)
        self._set_classifier(num_classes, pool, **self._device_and_dtype())
        init_linear(self.head)

    def _set_classifier(
        self, num_classes: int, pool: str, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        of_map = pool if pool in POOLS else ""
        self.pool, self.head = create_classifier(
            self.embed_dim, num_classes, of_map, input_fmt="NHWC", device=device, dtype=dtype
        )
        self.num_classes, self.global_pool = num_classes, pool
        self.head_hidden_size = self.embed_dim * self.pool.feat_mult()
        self.pool.train(self.training)
        self.head.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer groups for layer-wise learning rates, from the stem to the head."""
        with_previous = (99999,)  # timm's sign for "in the group of what comes before"
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^pos_drop",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", with_previous)],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would push to a meaningless value (1-D ones are known anyway)."""
        leaves = ("A_log", "A_b_log", "D", "D_b", "pos_embed", "cls_token", "cls_token_head", "cls_token_tail")
        names = {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in leaves}
        return names | {n for n, _ in self.named_parameters() if n.endswith(("dt_proj.bias", "dt_proj_b.bias"))}

    def convert_state_dict(self, state_dict: Mapping[str, Tensor], legacy_pos_embed: bool = False) -> dict[str, Tensor]:
        """Published entries brought to this model, see `bring_to_grid`."""
        return bring_to_grid(state_dict, self, [self.grid], legacy_pos_embed)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of the blocks `indices` do not need; returns the indices as non-negative numbers."""
        wanted, last = feature_take_indices(len(self.layers), indices)
        last += self.if_bidirectional and last % 2 == 0  # pairs stay together
        del self.layers[last + 1 :]
        if prune_norm:
            self.norm_f = nn.Identity().train(self.training)
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


# ---- checkpoints ----


def checkpoint_filter_fn(
    state_dict: Mapping[str, Tensor], model: VisionMamba, legacy_pos_embed: bool = False
) -> dict[str, Tensor]:
    """The weights of a file that timm loads, see `bring_to_grid`; what timm knows of their images says their grid."""
    arguments = getattr(model, "pretrained_model_args", {})
    input_size = getattr(model, "pretrained_cfg", {}).get("input_size")
    grid_of, grids = model.patch_embed.grid, [model.grid]
    if arguments.get("img_size"):
        grids.insert(0, grid_of(*to_2tuple(arguments["img_size"])))
    if input_size:  # of the registry, where no other is stored with the weights
        grids.append(grid_of(*input_size[1:]))
    return bring_to_grid(state_dict.get("model", state_dict), model, grids, legacy_pos_embed)


# ---- variants ----

VARIANTS = {
    "vim_tiny_patch16_224": {"embed_dim": 192},
    "vim_tiny_patch16_stride8_224": {"embed_dim": 192, "stride": 8},
    "vim_small_patch16_224": {"embed_dim": 384},
    "vim_small_patch16_stride8_224": {"embed_dim": 384, "stride": 8},
    "vim_base_patch16_224": {"embed_dim": 768},
    "vim_nano": {"img_size": 32, "patch_size": 4, "stride": 4, "depth": 6, "embed_dim": 64, "drop_path_rate": 0.05},
}
"""Arguments of the published models and of one for small images, by registry name."""


def _cfg(**kwargs) -> dict:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    pretrained_cfgs(VARIANTS, _cfg()) | {"vim_nano": _cfg(input_size=(3, 32, 32), num_classes=10)}
)


def _create_vim(variant: str, pretrained: bool, **kwargs) -> VisionMamba:
    arguments = VARIANTS[variant] | kwargs
    return build_model(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **arguments,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create_vim("vim_tiny_patch16_224", pretrained, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create_vim("vim_small_patch16_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionMamba:
    return _create_vim("vim_base_patch16_224", pretrained, **kwargs)


@register_model
def vim_nano(pretrained: bool = False, **kwargs) -> VisionMamba:
    """For images of 32 to 64 pixels: 8x8 patches at 32 pixels."""
    return _create_vim("vim_nano", pretrained, **kwargs)
