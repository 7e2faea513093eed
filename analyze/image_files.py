"""Images as users name them: files, folders, the range of their values, and what cannot be read."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from analyze.inputs import run_config
from ssm_train.common.decode import UNREADABLE, Decoder
from ssm_train.common.errors import UserError
from ssm_train.common.image_names import SUFFIXES, is_hidden, is_image
from ssm_train.data.build import decoder
from ssm_train.data.sources.base import read_range

RGB = Decoder(option="--range", upright=True)


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, and of folders all images below them, sorted, without hidden ones. UserError where there is
    none."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if is_image(p.name) and p.is_file())
            inside = [p for p in inside if not any(map(is_hidden, p.relative_to(path).parts))]
            if not inside:
                raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path} does not exist: give an image or a folder of images")
    return found


def image_decoder(checkpoint: Path | None, asked: Sequence[float] | None = None) -> Decoder:
    """How images are read for the model of a checkpoint: as its run read them (RGB or grey, upright or as stored), for
    other weights in RGB and upright; with the range of `asked` (--range) or else of that run. UserError for what is no
    range."""
    cfg = run_config(checkpoint)
    if asked is not None and not asked[0] < asked[1]:
        raise UserError(f"--range {asked[0]:g} {asked[1]:g}: the first value must be below the second")
    trained = Decoder(upright=True) if cfg is None else decoder(cfg)
    return trained._replace(range=trained.range if asked is None else tuple(asked), option="--range")


def read_image(path: Path, decoder: Decoder = RGB) -> Image.Image:
    """An image of any size and mode (grey, alpha, CMYK, palette, with a range also 16 bit and float) in 8 bits."""
    try:
        return decoder(read_range(path))
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


class Readable:
    """(path, image) of files, one after another. Those that cannot be read are named on stderr and left out.

    Raises:
        UserError: while iterating, when all have been tried and none could be read.
    """

    def __init__(self, paths: Sequence[Path], decoder: Decoder = RGB) -> None:
        self.paths, self.decoder = paths, decoder
        self.left_out: list[str] = []
        """Why, each with the name of the file."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def status(self) -> int:
        """Of a command that has gone on without what could not be read."""
        return int(bool(self.left_out))

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for path in self.paths:
            try:
                image = read_image(path, self.decoder)
            except UserError as error:
                self.left_out.append(str(error))
                print(error, file=sys.stderr)
                continue
            yield str(path), image
        if self.paths and len(self.left_out) == len(self.paths):
            raise UserError(f"none of the {len(self.paths)} images is readable, e.g. {self.left_out[0]}")


def to_tensor(image: Image.Image, name: str, size: tuple[int, int] | None = None) -> torch.Tensor:
    """RGB or grey image -> (1, C, H, W) fp32, normalised as model `name` was trained, resized to `size` (H, W) if
    given."""
    if size is not None:
        image = TF.resize(image, list(size), TF.InterpolationMode.BICUBIC)
    return TF.normalize(TF.to_tensor(image), *statistics(name, len(image.getbands())))[None]


def statistics(name: str, count: int) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that model `name` was trained with; for grey images (`count` 1) the means of the
    three."""
    settings = timm.get_pretrained_cfg(name)
    values = settings.mean, settings.std
    return values if count == 3 else tuple((sum(value) / len(value),) for value in values)


def sample_images(decoder: Decoder = RGB) -> dict[str, Image.Image]:
    """The two photographs that come with scikit-learn, a temple and a flower (640x427), by file name, in the channels
    of the decoder."""
    from sklearn.datasets import load_sample_images  # takes a second to import, and few commands need it

    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    return {name: decoder.converted(Image.fromarray(pixels)) for name, pixels in zip(names, found.images, strict=True)}


def given_or_photographs(
    paths: Sequence[Path] | None, decoder: Decoder
) -> tuple[Readable, Iterator[tuple[str, Image.Image]]]:
    """The files and folders of --images, and (name, image) of what can be read in them; without any, those of the two
    photographs. Raises UserError."""
    files = Readable(find_images(paths or []), decoder)
    return files, iter(files) if paths else iter(sample_images(decoder).items())
