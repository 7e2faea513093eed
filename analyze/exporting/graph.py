"""A model as a graph for other runtimes: which form of the scans it shows, and which sizes it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import set_exportable
from torch import nn
from torch.export import Dim, ExportedProgram

from ssm_models.layers.bimamba import BiMamba
from ssm_models.layers.nc_ssd import NCSSD
from ssm_models.layers.ss2d import SS2D
from ssm_models.layers.ss2d_m0 import SS2DM0
from ssm_models.layers.ss2d_xv import SS2DXv
from ssm_models.layers.stem import PatchMerging
from ssm_ops import _native
from ssm_train.common.errors import UserError


def plain_model(make: Callable[[], nn.Module], weights: dict[str, torch.Tensor]) -> nn.Module:
    """The model that `make` makes, with `weights`, of PyTorch's own operators alone."""
    with set_exportable(True):
        model = make()
    model.load_state_dict(weights)
    return model.eval()


def with_operators(model: nn.Module) -> nn.Module:
    """A `plain_model`, changed so that its graph has one node for every scan.

    Raises:
        UserError: the library is not built whose operators the nodes are, whoever computes them.
    """
    if _native.PROBLEMS["cpu"] is not None:
        raise UserError(f"an export in which scans are nodes is made beside {_native.PROBLEMS['cpu']}")
    for module in model.modules():
        if isinstance(module, (NCSSD, SS2DM0)):
            module.impl = "auto"
        elif isinstance(module, (SS2D, SS2DXv)):
            module.impl = "cpu"
        elif isinstance(module, BiMamba):
            module.impl = module.side_impl = "cpu"
        elif isinstance(module, PatchMerging):
            module.__class__ = _AnySizeMerging
    return model


class _AnySizeMerging(PatchMerging):
    """`PatchMerging` without a branch on odd sizes, of which a graph would keep one side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:] if self.channel_first else x.shape[1:3]
        down, right = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (() if self.channel_first else (0, 0)) + (0, 2 * right - width, 0, 2 * down - height))
        if self.channel_first:
            x = x.reshape(*x.shape[:2], down, 2, right, 2).permute(0, 5, 3, 1, 2, 4).flatten(1, 3)
        else:
            x = x.reshape(x.shape[0], down, 2, right, 2, x.shape[3]).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


def trace(model: nn.Module, size: tuple[int, int], channels: int = 3) -> ExportedProgram:
    """The graph of `model`, in evaluation mode, for images (B, channels, *size) with any B."""
    images = torch.zeros(2, channels, *size)
    return export(model, (images,), ({0: Dim.DYNAMIC},), any_size=False)


def example(size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Images (2, channels, H, W) to trace on for any H and W.

    Of a size that no position embedding was learned for, so that the graph resizes it, and large enough for the last
    map of a model to have several rows and columns: what is 1 in a trace stays 1.
    """
    return torch.zeros(2, channels, max(size[0] + 32, 96), max(size[1] + 64, 160))


def export(model: nn.Module, given: tuple, free: tuple, any_size: bool) -> ExportedProgram:
    """`model` as it computes on the tensors `given`, whose sizes marked in `free` may be others.

    They are marked by Dim.DYNAMIC, which need not prove that shapes fit for every size as a named one: we try some.
    """
    with torch.no_grad():
        program = torch.export.export(
            model,
            given,
            dynamic_shapes=free,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=any_size,
        )
    if any_size:
        _forget_the_example(program)
    return program


def _forget_the_example(program: ExportedProgram) -> None:
    """Take out what asserts of other sizes that the same branches would be taken. They need not: bicubic interpolation
    to the size that is there gives the same numbers."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
