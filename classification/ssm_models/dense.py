"""Backbones for dense prediction: a norm on every stage's map, a tuple of NCHW maps, no classifier. Framework-free."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .layers.norm import get_norm
from .vssm import VSSM


class DenseVSSM(VSSM):
    """VMamba as a backbone; keys are those of `VSSM` without the classifier, plus `outnorm{i}`.

    Args:
        out_indices: stages whose maps are given out.
        others: of `VSSM`.
    """

    def __init__(self, out_indices: Sequence[int] = (0, 1, 2, 3), norm_layer: str = "ln", **vssm_args):
        super().__init__(norm_layer=norm_layer, **vssm_args)
        bad = [i for i in out_indices if not 0 <= i < self.num_layers]
        if bad or not out_indices:
            raise ValueError(f"out_indices={tuple(out_indices)} must name stages 0..{self.num_layers - 1}")
        self.out_indices = tuple(out_indices)
        del self.classifier
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", get_norm(norm_layer)(self.dims[i]))

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
