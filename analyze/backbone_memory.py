"""Memory of detectors' backbones, forward and backward: ours beside mmdet's Swin-T, in the same run.

python analyze/backbone_memory.py [--models vmamba_tiny_s1l8] [--size 800 1280] [--out backbone_memory.csv]

The most that PyTorch had handed out at once for activations, gradients and temporaries during one step in fp32 on one
image, weights left out; see analyze/memory.py for how it is counted. All outputs of the backbones get a gradient.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from analyze.inputs import check_writable, find_device
from analyze.memory import peak_bytes
from analyze.tables import write_csv
from ssm_mm.packages import require
from ssm_models import DenseBackbone
from ssm_train.common.command import run
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


def measure(models: list[str], size: tuple[int, int], device: torch.device) -> list[dict[str, object]]:
    """A row per backbone, Swin-T last. UserError for a model that the zoo has not, and without mmdet."""
    try:
        require("mmdet")
    except UserError as error:
        raise UserError(str(error)) from error
    from mmdet.models.backbones import SwinTransformer  # not of every installation

    images = torch.randn(1, 3, *size, device=device)
    rows = []
    for name in (*models, SWIN):
        try:
            backbone = SwinTransformer(drop_path_rate=0.0) if name == SWIN else DenseBackbone(name, drop_path_rate=0.0)
        except ValueError as error:
            raise UserError(f"--models: {error}") from error
        step = step_of(backbone.to(device), images)  # in training mode, as it was built
        step()  # compiles kernels
        parameters = sum(p.numel() for p in backbone.parameters())
        values = (name, *size, parameters, peak_bytes(step, device) / 2**20)
        rows.append(dict(zip(_COLUMNS, values, strict=True)))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="analyze/backbone_memory.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["vmamba_tiny_s1l8"], metavar="NAME", help="(vmamba_tiny_s1l8)")
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1280], metavar=("H", "W"), help="(800 1280)")
    parser.add_argument("--device", default="", choices=("", "cpu", "cuda"), help="(CUDA where there is one)")
    parser.add_argument("--out", type=Path, default=Path("backbone_memory.csv"), help="(backbone_memory.csv)")
    args = parser.parse_args(argv)

    def command() -> None:
        check_writable(args.out)
        rows = measure(args.models, tuple(args.size), find_device(args.device))
        for row in rows:
            print(f"{row['backbone']:24} {row['parameters'] / 1e6:6.1f} M parameters  {row['peak_mib']:8.1f} MiB")
        write_csv(args.out, _COLUMNS, map(dict.values, rows))
        print(args.out)

    return run(command)


if __name__ == "__main__":
    sys.exit(main())
