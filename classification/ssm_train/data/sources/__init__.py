"""The formats of image data sets: DATA.DATASET -> class, one file each. Archives are read in place, never unpacked."""

from ssm_train.data.sources.base import ImageSource
from ssm_train.data.sources.cache import cached
from ssm_train.data.sources.cifar import Cifar10Source, Cifar100Source
from ssm_train.data.sources.folder import FolderSource
from ssm_train.data.sources.image_list import ImageListSource
from ssm_train.data.sources.parquet import ParquetSource
from ssm_train.data.sources.photos import PhotoSource
from ssm_train.data.sources.tar import TarSource
from ssm_train.data.sources.zip import ZipSource

FORMATS = {
    "folder": FolderSource,
    "photos": PhotoSource,
    "zip": ZipSource,
    "tar": TarSource,
    "parquet": ParquetSource,
    "imagenet22k": ImageListSource,
    "cifar10": Cifar10Source,
    "cifar100": Cifar100Source,
}

__all__ = ["FORMATS", "ImageSource", "PhotoSource", "cached"]
