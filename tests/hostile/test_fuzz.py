"""Mutations of valid files of our other formats: a value, or the one exception that the format's reader promises.

Files of weights are in tests/models/test_hostile_files.py.
"""

import io
import json
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ssm_train.common.decode import LARGEST_PIXELS, UNREADABLE, Decoder
from ssm_train.common.errors import UserError
from ssm_train.config.defaults import default_config
from ssm_train.config.load import parse_config
from ssm_train.record.meta import FORMAT, parse_meta

from ..models.test_hostile_files import mutate
from ..run_meta import META
from .amount import amounts


def image(kind: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def read_meta(data: bytes) -> None:
    meta = parse_meta(data)
    assert meta["format"] == FORMAT and meta["updates"] >= 0 and meta["weights"] in ("model", "model_ema")


def read_config(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    assert parse_config(text).TRAIN.EPOCHS >= 1


def read_image(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of Pillow's reaches the log of a run
        assert 0 < np.prod(Decoder(range=(0, 255))(data).size) <= LARGEST_PIXELS


READERS: dict[str, tuple[bytes, Callable[[bytes], None], tuple[type[Exception], ...]]] = {
    "meta.json": (json.dumps({"format": FORMAT, "epoch": 1, "update": 0, **META}).encode(), read_meta, (UserError,)),
    "config.yaml": (default_config().dump().encode(), read_config, (UserError,)),
    **{kind: (image(kind), read_image, UNREADABLE) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")},
    "palette": (image("PNG", "P"), read_image, UNREADABLE),
    "float": (image("TIFF", "F"), read_image, UNREADABLE),
}


@pytest.mark.parametrize("files", amounts(60, 2000))
@pytest.mark.parametrize("kind", READERS)
def test_random_damage(kind, files):
    data, read, promised = READERS[kind]
    read(data)
    draw, refused = random.Random(files), 0
    for _ in range(files if kind != "config.yaml" else files // 10):
        try:
            read(mutate(data, draw))
        except promised as error:
            refused += 1
            assert not isinstance(error, UserError) or (str(error).isprintable() and len(str(error)) < 1000)
    assert refused > 0 or kind == "BMP"
