"""A validation, image by image: its answers are collected, and written down with pictures of the worst."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import functional as TF

from ssm_models.printable import printable
from ssm_train.common.distributed import World
from ssm_train.data.dataset import BadImage, Batch, load_image
from ssm_train.data.sources import ImageSource
from ssm_train.record.answers import Answer, worst, write_tables
from ssm_train.record.sheet import Tile, draw_sheet

_ON_SHEET, _TILE = 16, 160  # images, and the side of one in pixels
_LONGEST = 20  # characters of a name in a caption


class Answers:
    """The answers of one network on this rank, taken up batch by batch."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._values: list[torch.Tensor] = []

    def add(self, batch: Batch, logits: torch.Tensor) -> None:
        """`logits` (B, K) in fp32, of the images of `batch`."""
        self._keys += zip((key.index for key in batch.keys), batch.targets.tolist(), strict=True)
        losses = F.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
        confidence, predicted = logits.softmax(-1).max(-1)
        # stays on the device: reading it would stop a GPU at every batch
        self._values.append(torch.stack([predicted.float(), confidence, losses], 1))

    def of_all(self, world: World) -> list[Answer]:
        """Of the images of all ranks, in the order of the data. All ranks must call it."""
        values = torch.cat(self._values).tolist() if self._values else []
        mine = [
            Answer(*key, int(predicted), confidence, loss)
            for key, (predicted, confidence, loss) in zip(self._keys, values, strict=True)
        ]
        return sorted(answer for part in world.gather(mine) for answer in part)


def write_answers(folder: Path, stem: str, source: ImageSource, answers: Sequence[Answer]) -> None:
    """Write the files of `stem`, see record/answers.py. `source` is the split that the answers are of."""
    images = [printable(source.name(answer.index)) for answer in answers]
    write_tables(folder, stem, answers, source.classes, images)
    save_worst(folder / f"{stem}_worst.png", source, worst(answers, _ON_SHEET))


def save_worst(path: Path, source: ImageSource, answers: Sequence[Answer]) -> None:
    """The sheet of some images: what each was taken for, and what it is."""
    tiles = []
    for answer in answers:
        image = load_image(source, answer.index)
        if isinstance(image, BadImage):  # it was readable a moment ago
            image = Image.new("RGB", (_TILE, _TILE))
        small = ImageOps.pad(image.convert("RGB"), (_TILE, _TILE), color="white")
        caption = f"{_short(source.classes[answer.predicted])}  {answer.confidence:.0%}"
        wrong = answer.predicted != answer.true
        caption += f"\nis {_short(source.classes[answer.true])}" if wrong else "\nis right"
        tiles.append(Tile(TF.to_tensor(small), caption, wrong, note=_short(Path(source.name(answer.index)).name)))
    picture = io.BytesIO()
    draw_sheet(tiles, "validation images with the highest loss").savefig(picture, format="png", dpi=120)
    path.write_bytes(picture.getvalue())


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
