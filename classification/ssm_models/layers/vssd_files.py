"""What published files of VSSD's second generation hold beside weights, and how they may spell them.

No such file has been read for this: what they hold is known from code and from counts. Open are

* the names of the downsampling, either those of RMT (``downsample.reduction``, ``downsample.norm``), which are this
  library's, or those that VSSD's convolutions of 2024 have (``downsample.conv.0.conv``, ``downsample.conv.0.norm`` or
  ``downsample.norm``),
* whether the rotations of keys and queries are in them, and whether as ``attn.ropes.rotations`` or
  ``attn.rope.rotations``,
* which of a file's sets has the published accuracy: the table of weights takes the averaged one, `which="model"` of
  `load_checkpoint` the other.

All spellings load, strictly; what `load_checkpoint` returns tells which it was. A file with rotations other than the
computed ones does not: its weights were trained with another position embedding than `map_rope`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .map_rope import rotations

_ROTATIONS = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.ropes?\.rotations")
_DOWNSAMPLE = [
    (re.compile(r"^(layers\.\d+\.downsample)\.conv\.0\.conv\."), r"\1.reduction."),
    (re.compile(r"^(layers\.\d+\.downsample)\.conv\.0\.norm\."), r"\1.norm."),
]


def is_rotations(name: str, rotated: Mapping[int, int]) -> bool:
    """Whether an entry is the table of rotations of a stage in `rotated`, a d_state per stage that has some."""
    found = _ROTATIONS.fullmatch(name)
    return found is not None and int(found[1]) in rotated


def published_names(
    state_dict: Mapping[str, Tensor], rotated: Mapping[int, int], rmt_downsample: bool
) -> dict[str, Tensor]:
    """Weights by this library's names, without rotations.

    Args:
        rotated: see `is_rotations`.
        rmt_downsample: the model has `RMTDownsample`, whose names are uncertain.

    Raises:
        ValueError: rotations other than the computed ones, or weights that are there twice.
    """
    found = {}
    for name, value in state_dict.items():
        if is_rotations(name, rotated):
            _check_rotations(name, value, rotated[int(_ROTATIONS.fullmatch(name)[1])])
            continue
        for pattern, replacement in _DOWNSAMPLE if rmt_downsample else ():
            name = pattern.sub(replacement, name)
        if name in found:
            raise ValueError(f"{name} is there twice, by two of its names")
        found[name] = value
    return found


def _check_rotations(name: str, table: Tensor, d_state: int) -> None:
    """(H, W, N/2, 2): cosine and sine of every token and pair of features."""
    if table.dim() != 4 or table.shape[2:] != (d_state // 2, 2) or not table.is_floating_point():
        raise ValueError(f"{name} is {tuple(table.shape)} in {table.dtype}, not (H, W, {d_state // 2}, 2) of floats")
    if table.is_meta:
        return
    expected = torch.stack(rotations(*table.shape[:2], d_state, like=table), dim=3)
    # angles go up to the side of the map, in float32
    difference = (table - expected).abs().max().item()
    if not difference <= 1e-4 + torch.finfo(table.dtype).eps:
        raise ValueError(
            f"{name} differs by {difference:.1g} from the rotations of this model: another position embedding"
        )
