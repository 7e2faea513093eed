"""DATA.CACHE_MODE: encoded images in RAM."""

import logging

import numpy as np
from PIL import Image

from ssm_train.common.decode import UNREADABLE
from ssm_train.common.distributed import World
from ssm_train.data.sources.base import ImageSource

_log = logging.getLogger(__name__)


class CachedSource(ImageSource):
    """A source whose images at `indices` are held in RAM, in one buffer that forked workers share.

    Others, and those that could not be read when the cache was filled, are read from the source.
    """

    def __init__(self, source: ImageSource, indices: range) -> None:
        super().__init__(source.root, source.classes, source.targets)
        self.CLASS, self.decoder, self._source = source.CLASS, source.decoder, source
        self._spans = np.full((len(source), 2), -1, np.int64)
        self._buffer = bytearray()
        for index in indices:
            try:
                data = source.read(index)
            except UNREADABLE:
                continue
            self._spans[index] = len(self._buffer), len(self._buffer) + len(data)
            self._buffer += data
        held = int((self._spans[:, 0] >= 0).sum())
        _log.info("%d of %d images of %s in RAM, %.1f MB", held, len(source), source.root, len(self._buffer) / 1e6)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def read(self, index: int) -> bytes:
        start, end = self._spans[index].tolist()
        return self._source.read(index) if start < 0 else bytes(memoryview(self._buffer)[start:end])

    def decode(self, data: bytes) -> Image.Image:
        return self._source.decode(data)


def cached(source: ImageSource, mode: str, world: World) -> ImageSource:
    """`source` itself (no), or with every `world.size`-th image from the rank's on in RAM (part), or all (full)."""
    if mode == "no":
        return source
    return CachedSource(source, range(world.rank, len(source), world.size) if mode == "part" else range(len(source)))
