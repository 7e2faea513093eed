"""What the tests of detection's and segmentation's published configs share: configs read once, models counted once."""

import functools
from collections.abc import Iterable
from pathlib import Path

import pytest

from ssm_mm.config import read_config
from ssm_mm.flops import DenseCard, dense_card

ROOT = Path(__file__).parents[1]


def model_of(stem: str) -> str:
    """The backbone in the name of a config, "vmamba-tiny-s1l8"."""
    return stem.split("_")[1]


ONE_OF_A_FAMILY = {"vanilla-vmamba-tiny", "vmamba-tiny-s1l8", "vssd-tiny", "vssd-tiny-iccv2025", "vim-tiny"}


def families(names: Iterable[str]) -> list:
    """Backbones as test parameters: one of a family, and the others, which differ in sizes alone, marked `full`."""
    return [name if name in ONE_OF_A_FAMILY else pytest.param(name, marks=pytest.mark.full) for name in names]


class Configs:
    """Those of a folder of configs/ that name a published model; costs are for images of (height, width)."""

    def __init__(self, task: str, image: tuple[int, int]) -> None:
        self.task, self.image = task, image
        self.paths = {path.stem: path for path in sorted((ROOT / "configs" / task).glob("v*/[!_]*.py"))}
        self._readme = (ROOT / "configs" / task / "README.md").read_text().splitlines()

    def row_of(self, name: str) -> str:
        """Of the table in the README."""
        [row] = [line for line in self._readme if line.startswith(f"| `{name}` |")]
        return row

    @functools.cache  # noqa: B019  as many as there are folders
    def config(self, stem: str):
        return read_config(str(self.paths[stem]))

    @functools.cache  # noqa: B019
    def card(self, name: str) -> DenseCard:
        return dense_card(self.config(next(stem for stem in self.paths if model_of(stem) == name)), self.image)

    def check_backbone(self, stem: str, drop_path: float) -> None:
        """It is ours, with a drop path of its own and no weights; nothing of the base config's backbone is left."""
        backbone, name = self.config(stem).model.backbone, model_of(stem)
        family = {"type", "name", "checkpoint", "drop_path_rate"}
        family |= {"out_indices", "model_args"} if "vim" in stem else set()
        assert set(backbone) == family
        assert backbone.type == "SSMBackbone" and backbone.checkpoint is None
        assert backbone.name.startswith(name.replace("-", "_"))
        assert backbone.drop_path_rate == drop_path and f"| {drop_path} |" in self.row_of(name)
        assert self.config(stem).custom_imports.imports == [f"{self.task}.backbone"]
