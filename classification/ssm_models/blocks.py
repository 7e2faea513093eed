"""The zoo's blocks for other people's networks, by the names and arguments of their publications. docs/blocks.md

They are those of the models, with the same numbers and state-dict keys, so trained weights move in both directions.

Shapes: B batch, H W map, C channels. Maps are (B, H, W, C), or (B, C, H, W) with `channel_first`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from timm.layers import LayerNorm2d
from torch import Tensor

from . import vssm
from .layers import nc_ssd, ss2d
from .layers.act import get_act
from .layers.bimamba import BiMamba
from .layers.forward_type import mixer_family
from .layers.mlp import Mlp
from .layers.norm import get_norm, is_channel_first

__all__ = ["NCSSD", "SS2D", "Mamba", "VSSBlock"]

Norm = str | Callable[[int], nn.Module]

# What the block of the later publication has without being told otherwise.
_LATER = {
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0,
    "ssm_init": "v0",
    "forward_type": "v2",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
}
_FIRST = {"attn_drop_rate": 0.0, "d_state": 16, "expand": 2.0, "dt_rank": "auto"}


class VSSBlock(vssm.VSSBlock):
    """VMamba's block on a map, x + drop_path(op(norm(x))), and in its later form + drop_path(mlp(norm2(x))).

    Two blocks were published under this name, with arguments of their own. Without any of the second one's it is the
    first: four gated scans (the v0 models) and no MLP. With one of them it is the second, and the others have the
    defaults given here.

    Args:
        hidden_dim: C.
        drop_path: rate of the branches.
        norm_layer: a constructor `norm(channels)`, or "ln", "ln2d", "bn". LayerNorm is taken over the channels in both
            layouts. None: LayerNorm, with eps 1e-6 in the first block and 1e-5 in the second, as published.
        attn_drop_rate, d_state, expand, dt_rank: of the first block's mixer: dropout of its result (0), states (16),
            inner channels per channel (2), rank of the step sizes ("auto").
        channel_first: maps are (B, C, H, W).
        ssm_d_state (16), ssm_ratio (2), ssm_dt_rank ("auto"), ssm_act_layer ("silu"), ssm_conv (3),
            ssm_conv_bias (True), ssm_drop_rate (0), ssm_init ("v0"), forward_type ("v2"): of the second block's mixer,
            see `VSSM`. Activations are named, or given as a class such as `nn.SiLU`.
        mlp_ratio (4), mlp_act_layer ("gelu"), mlp_drop_rate (0), gmlp (False): of its MLP.
        use_checkpoint: recompute the block in the backward pass instead of keeping its activations.
        impl: implementation of the scan, see `ssm_ops`.
        device, dtype: of the parameters.

    Raises:
        TypeError: arguments of both blocks at once, or of none.
        ValueError: a value that is not legal.
    """

    def __init__(
        self,
        hidden_dim: int,
        drop_path: float = 0.0,
        norm_layer: Norm | None = None,
        attn_drop_rate: float | None = None,
        d_state: int | None = None,
        *,
        expand: float | None = None,
        dt_rank: int | str | None = None,
        channel_first: bool = False,
        ssm_d_state: int | None = None,
        ssm_ratio: float | None = None,
        ssm_dt_rank: int | str | None = None,
        ssm_act_layer: str | type[nn.Module] | None = None,
        ssm_conv: int | None = None,
        ssm_conv_bias: bool | None = None,
        ssm_drop_rate: float | None = None,
        ssm_init: str | None = None,
        forward_type: str | None = None,
        mlp_ratio: float | None = None,
        mlp_act_layer: str | type[nn.Module] | None = None,
        mlp_drop_rate: float | None = None,
        gmlp: bool | None = None,
        use_checkpoint: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        given = {name: value for name, value in locals().items() if name in _FIRST | _LATER and value is not None}
        first, later = ([name for name in given if name in of_block] for of_block in (_FIRST, _LATER))
        if first and later:
            raise TypeError(
                f"VSSBlock: {', '.join(first)} of the first published block beside {', '.join(later)} of the second; "
                f"the second has {', '.join(name for name in _LATER if name.startswith('ssm'))}"
            )
        if later:
            a = _LATER | given
        else:
            a = _FIRST | given
            mixer = {"ssm_d_state": "d_state", "ssm_ratio": "expand", "ssm_dt_rank": "dt_rank"}
            a = {name: a[theirs] for name, theirs in (mixer | {"ssm_drop_rate": "attn_drop_rate"}).items()}
            a = _LATER | a | {"forward_type": "v0", "mlp_ratio": 0.0}
        norm = _norm(norm_layer or partial(nn.LayerNorm, eps=1e-5 if later else 1e-6), channel_first)
        op = mlp = None
        if a["ssm_ratio"] > 0:
            op = vssm._MIXERS[mixer_family(a["forward_type"])](
                d_model=hidden_dim,
                d_state=a["ssm_d_state"],
                ssm_ratio=a["ssm_ratio"],
                dt_rank=a["ssm_dt_rank"],
                act_layer=_act(a["ssm_act_layer"]),
                d_conv=a["ssm_conv"],
                conv_bias=a["ssm_conv_bias"],
                dropout=a["ssm_drop_rate"],
                initialize=a["ssm_init"],
                forward_type=a["forward_type"],
                channel_first=channel_first,
                impl=impl,
            )
        if a["mlp_ratio"] > 0:
            mlp = Mlp(
                hidden_dim,
                int(hidden_dim * a["mlp_ratio"]),
                _act(a["mlp_act_layer"]),
                a["mlp_drop_rate"],
                gated=a["gmlp"],
                channel_first=channel_first,
            )
        super().__init__(op, mlp, hidden_dim, "ln", drop_path)
        if op is not None:
            self.norm = norm(hidden_dim)
        if mlp is not None:
            self.norm2 = norm(hidden_dim)
        self.use_checkpoint = use_checkpoint
        self.to(device=device, dtype=dtype)
        self.register_load_state_dict_pre_hook(_rename_incoming)


class SS2D(ss2d.SS2D):
    """VMamba's mixer alone: a map is read along four routes, and the results are summed.

    Args:
        d_model: C.
        d_state: states of a channel.
        ssm_ratio: inner channels per channel; `expand` is its older name. None: 2.
        act_layer: a name, or a class such as `nn.SiLU`.
        channel_first: maps are (B, C, H, W).
        others: see `ssm_models.layers.ss2d.SS2D`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        ssm_ratio: float | None = None,
        dt_rank: int | str = "auto",
        act_layer: str | type[nn.Module] = "silu",
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        initialize: str = "v0",
        forward_type: str = "v2",
        channel_first: bool = False,
        *,
        expand: float | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if ssm_ratio is not None and expand is not None:
            raise TypeError(f"SS2D: ssm_ratio={ssm_ratio} and expand={expand} are two names of one number: give one")
        ratio = next((value for value in (ssm_ratio, expand) if value is not None), 2.0)
        super().__init__(
            d_model,
            d_state,
            ratio,
            dt_rank,
            _act(act_layer),
            d_conv,
            conv_bias,
            dropout,
            initialize,
            forward_type,
            channel_first,
            impl,
        )
        self.to(device=device, dtype=dtype)


class Mamba(BiMamba):
    """Vim's mixer, a selective scan in both directions (`bimamba_type="none"`: forwards only); arguments of `BiMamba`.

    It takes tokens (B, L, C), or maps (B, H, W, C), which it reads row by row.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) or (B, H, W, C) -> the same."""
        if x.dim() == 4:
            return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return super().forward(x)


class NCSSD(nc_ssd.NCSSD):
    """VSSD's mixer, in which every token of a map sees every other; arguments of `ssm_models.layers.nc_ssd.NCSSD`, and

    Args:
        channel_first: maps are (B, C, H, W).
    """

    def __init__(self, d_model: int, *args, channel_first: bool = False, **kwargs):
        super().__init__(d_model, *args, **kwargs)
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; (B, C, H, W) with `channel_first`."""
        if self.channel_first:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


def _act(act: str | type[nn.Module]) -> str:
    """The name of an activation that is given by it or as a class."""
    for name in ("silu", "gelu", "relu", "sigmoid"):
        if act is type(get_act(name)):
            return name
    if not isinstance(act, str):
        raise ValueError(f"activation {act!r} is neither nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid nor one of their names")
    return act


def _norm(norm_layer: Norm, channel_first: bool) -> Callable[[int], nn.Module]:
    """A constructor of norms over the channels, for the layout."""
    if isinstance(norm_layer, str):
        if is_channel_first(norm_layer) != channel_first:
            raise ValueError(f"norm_layer={norm_layer!r} is not for channel_first={channel_first}")
        return get_norm(norm_layer)
    plain = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    if channel_first and plain is nn.LayerNorm:
        options = norm_layer.keywords if isinstance(norm_layer, partial) else {"eps": 1e-5}
        return partial(LayerNorm2d, **options)
    return norm_layer


def _rename_incoming(block: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Hook of `load_state_dict`: the first block's own names of its two parts."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        rest = name[len(prefix) :]
        for old, new in (("ln_1.", "norm."), ("self_attention.", "op.")):
            if rest.startswith(old):
                state_dict[prefix + new + rest.removeprefix(old)] = state_dict.pop(name)
