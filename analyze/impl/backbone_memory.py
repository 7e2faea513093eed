"""Memory of detectors' backbones, forward and backward."""

import argparse
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from analyze.inputs import check_writable, find_device, progress
from analyze.memory import peak_bytes
from analyze.tables import write_csv
from ssm_mm.packages import require
from ssm_models import DenseBackbone
from ssm_train.common.errors import UserError

SWIN = "swin_tiny (mmdet)"
_COLUMNS = ("backbone", "height", "width", "parameters", "peak_mib")


def step_of(backbone: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Forward and backward as a detector makes them, without what is behind the maps."""

    def step() -> None:
        maps = backbone(images)
        torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        backbone.zero_grad(set_to_none=True)

    return step


def backbones(models: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Ours by their names, then mmdet's Swin-T; without mmdet it is left out, which is said on stderr. UserError for a
    model that the zoo has not."""
    for name in models:
        try:
            yield name, DenseBackbone(name, drop_path_rate=0.0)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
    try:
        require("mmdet")
    except UserError as error:
        print(f"{SWIN} is left out: {error}", file=sys.stderr)
        return
    from mmdet.models.backbones import SwinTransformer  # not of every installation

    yield SWIN, SwinTransformer(drop_path_rate=0.0)


def measure(models: list[str], size: tuple[int, int], device: torch.device) -> list[dict[str, object]]:
    """A row per backbone. UserError as `backbones`."""
    images = torch.randn(1, 3, *size, device=device)
    rows = []
    for name, backbone in progress(backbones(models), "backbones", len(models) + 1):
        step = step_of(backbone.to(device), images)  # in training mode, as it was built
        step()  # compiles kernels
        parameters = sum(p.numel() for p in backbone.parameters())
        values = (name, *size, parameters, peak_bytes(step, device) / 2**20)
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def command(args: argparse.Namespace) -> None:
    """The command. Raises UserError."""
    check_writable(args.out)
    rows = measure(args.model, tuple(args.size), find_device(args.device))
    for row in rows:
        print(f"{row['backbone']:24} {row['parameters'] / 1e6:6.1f} M parameters  {row['peak_mib']:8.1f} MiB")
    write_csv(args.out, _COLUMNS, map(dict.values, rows))
    print(args.out)
