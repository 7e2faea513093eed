"""What timm expects of a model, as far as it is the same for all families.

Shapes: B batch, C channels, H W map; maps are (B, H, W, C) or (B, C, H, W), as `output_fmt` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
from timm.layers import create_classifier, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.fx.proxy import TraceError

from .linear import of_channels

POOLS = ("avg", "max", "avgmax", "catavgmax")
"""timm's names of poolings; "" is none."""


def reset(module: nn.Module) -> None:
    """The values that a layer has when it is made."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def init_linear(module: nn.Module) -> None:
    """Initial values of a linear layer; anything else stays as it is."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def classify(head: nn.Module, x: Tensor, is_map: bool, output_fmt: str) -> Tensor:
    """Pooled features (B, C) -> logits (B, classes); without pooling those of every pixel of a map, in its layout."""
    return of_channels(head, x, channel_first=is_map and output_fmt == "NCHW")


def convert_incoming(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Hook of `load_state_dict`: convert this model's entries in place, also as a part ("backbone.") of another."""
    mine = {name[len(prefix) :]: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    state_dict.update({prefix + name: value for name, value in model.convert_state_dict(mine).items()})


class TimmModel(nn.Module):
    """Base of all families, which are not scripted, nor traced by torch.fx but for what is around the blocks of some:
    `torch.compile` and `torch.export` are.

    Attributes:
        in_chans, num_classes: channels of the images, and classes.
        num_features: C of `forward_features`.
        head_hidden_size: channels that the classifier sees, more than `num_features` with pooling "catavgmax".
        global_pool: how features are pooled. timm writes it beside the weights.
    """

    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    global_pool: str

    def init_weights(self, *, needs_reset: bool = True) -> None:
        """All parameters and buffers anew, as for a model built on the meta device that `to_empty` brought to another.

        Args:
            needs_reset: False where the layers have just been made and have their values.
        """
        if needs_reset:
            for part in self.children():
                part.apply(reset)
        self.reset_parameters()
        self._init_layers()

    def reset_parameters(self) -> None:
        """Values of what belongs to the model itself, beside its layers."""

    def _init_layers(self) -> None:
        """Values of layers where the family has others than the layers themselves."""
        self.apply(init_linear)

    def check_images(self, x: Tensor) -> None:
        """Raises ValueError for anything but (B, in_chans, H, W), and TraceError for what `torch.fx` cannot trace."""
        if isinstance(x, torch.fx.Proxy):
            self._check_tracer(x.tracer)
            return
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            hint = "; x[None] makes a batch of one image" if x.dim() == 3 else ""
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), not {tuple(x.shape)}{hint}")

    def _check_tracer(self, tracer: torch.fx.Tracer) -> None:
        raise TraceError(f"torch.fx cannot trace {type(self).__name__}, whose steps depend on sizes; torch.export can")

    def _device_and_dtype(self) -> dict[str, torch.device | torch.dtype]:
        """Of the model's weights, for layers that join later."""
        weight = next(self.layers.parameters())
        return {"device": weight.device, "dtype": weight.dtype}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = enable


class Stage(nn.Module):
    """Blocks at one resolution, then the way to the next one."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class PyramidModel(TimmModel):
    """A stem (`patch_embed`), stages (`layers`, of `Stage`), and norm -> pool -> head.

    Attributes:
        dims: channels of every stage.
        output_fmt: "NHWC" or "NCHW", the layout inside and of `forward_features`.
    """

    dims: list[int]
    output_fmt: str

    def _top(self) -> nn.Module:
        """The module whose `norm`, `pool` and `head` they are."""
        return self

    def _check_tracer(self, tracer: torch.fx.Tracer) -> None:
        if not tracer.is_leaf_module(self.layers[0].blocks[0], "layers.0.blocks.0"):
            raise TraceError(
                "torch.fx cannot look into the blocks: take timm.layers.create_feature_extractor, torchvision's with "
                "tracer_kwargs={'leaf_modules': timm.layers.get_notrace_modules()}, or torch.export"
            )

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> first tokens, in the layout of the model."""
        self.check_images(x)
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map in the layout of the model, before the norm of the head."""
        x = self.forward_stem(x)
        for stage in self.layers:
            x = stage(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Maps of the stages, each before its downsampling.

        Args:
            indices: the last n stages, the given ones, or all.
            norm: the head's norm on the last stage's map.
            stop_early: do not run the stages after the last wanted one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final features.

        Returns:
            A list of contiguous maps, or (final features as `forward_features`, list).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not one of NCHW, NHWC")
        wanted, last = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self.forward_stem(x)
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = stage.blocks(x)
            if i in wanted:
                final = norm and i == len(self.layers) - 1
                intermediates.append(self._to_format(self._top().norm(x) if final else x, output_fmt))
            x = stage.downsample(x)
        return intermediates if intermediates_only else (x, intermediates)

    def _to_format(self, x: Tensor, output_fmt: str) -> Tensor:
        if output_fmt != self.output_fmt:
            x = x.permute(0, 2, 3, 1) if output_fmt == "NHWC" else x.permute(0, 3, 1, 2)
        return x.contiguous()

    def get_classifier(self) -> nn.Module:
        return self._top().head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear layer, and a new pooling if one is given; without classes the pooled features come out."""
        self._set_classifier(
            num_classes, self.global_pool if global_pool is None else global_pool, **self._device_and_dtype()
        )
        init_linear(self.get_classifier())

    def _set_classifier(
        self, num_classes: int, global_pool: str, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        if global_pool.removeprefix("fast") not in (*POOLS, ""):  # timm's other way to compute the same
            raise ValueError(f"global_pool={global_pool!r} is not one of {', '.join(POOLS)}, or '' for none")
        pool, head = create_classifier(
            self.num_features, num_classes, global_pool, input_fmt=self.output_fmt, device=device, dtype=dtype
        )
        top = self._top()
        top.pool, top.head = pool.train(self.training), head.train(self.training)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of the stages `indices` do not need; returns the indices as non-negative numbers.

        The last norm and the classifier go with the last stage, for whose channels they are made.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        shorter = last < len(self.layers) - 1
        del self.layers[last + 1 :]
        self.layers[-1].downsample = nn.Identity().train(self.training)
        self.num_layers, self.num_features = last + 1, self.dims[last]
        if prune_norm or shorter:
            self._top().norm = nn.Identity().train(self.training)
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted
