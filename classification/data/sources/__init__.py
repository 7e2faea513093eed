"""The formats of image data sets: DATA.DATASET -> class, one file each. Archives are read in place, never unpacked."""

from classification.data.sources.base import ImageSource
from classification.data.sources.cache import cached
from classification.data.sources.cifar import Cifar10Source, Cifar100Source
from classification.data.sources.folder import FolderSource
from classification.data.sources.image_list import ImageListSource
from classification.data.sources.parquet import ParquetSource
from classification.data.sources.tar import TarSource
from classification.data.sources.zip import ZipSource

FORMATS = {
    "folder": FolderSource,
    "zip": ZipSource,
    "tar": TarSource,
    "parquet": ParquetSource,
    "imagenet22k": ImageListSource,
    "cifar10": Cifar10Source,
    "cifar100": Cifar100Source,
}

__all__ = ["FORMATS", "ImageSource", "cached"]
