"""Data sets of images with one binary mask each: MAS3K, RMAS, UFO120, RUWI, USOD10K and the embedded one."""

from collections.abc import Sequence
from pathlib import Path

from mmseg.datasets import BaseSegDataset

from ssm_train.common.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp")
_MASKS = (".png", ".bmp", ".jpg", ".jpeg")
_NAMED = 3


class MarineDataset(BaseSegDataset):
    """Every image of the folder `data_prefix.img_path` has the mask of its name in `data_prefix.seg_map_path`; suffixes
    may differ and be mixed. UserError names images without mask and masks without image."""

    METAINFO = {"classes": ("background", "animal"), "palette": [[30, 60, 90], [255, 160, 0]]}

    def load_data_list(self) -> list[dict]:
        """mmsegmentation's records, by name."""
        folders = [Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path")]
        images, masks = (
            _by_stem(folder, suffixes) for folder, suffixes in zip(folders, (_IMAGES, _MASKS), strict=True)
        )
        for found, others, what, lacking in ((images, masks, "image", "mask"), (masks, images, "mask", "image")):
            alone = sorted(set(found) - set(others))
            if alone:
                raise UserError(
                    f"{folders[0].parent}: {len(alone)} of {len(found)} {what}s without {lacking}: "
                    f"{_some([found[stem].name for stem in alone])} ({folders[0]}, {folders[1]})"
                )
        return [
            {
                "img_path": str(images[stem]),
                "seg_map_path": str(masks[stem]),
                "label_map": None,
                "reduce_zero_label": False,
                "seg_fields": [],
            }
            for stem in sorted(images)
        ]


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in suffixes:
            continue
        if path.stem in found:
            raise UserError(f"{folder} has {found[path.stem].name} and {path.name}: names must be unique")
        found[path.stem] = path
    if not found:
        raise UserError(f"{folder} has no files of {', '.join(suffixes)}")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
