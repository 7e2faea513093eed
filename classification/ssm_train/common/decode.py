"""Encoded bytes -> 8-bit image, grey or RGB, and what counts as unreadable.

Photographs that a camera has stored lying on their side say so in a tag (EXIF's orientation). `Decoder.upright` follows
it; without it pixels stay as they are stored, as in the evaluations that published accuracies come from (torchvision's
and timm's readers).

Images of more than 8 bits a channel say nowhere which of their values are black and white: 12-bit data in a 16-bit file
would be nearly black, floats constant. So they are read with a stated range (DATA.RANGE) or not at all.
"""

import functools
import io
import struct
import warnings
import zlib
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_png

# Only these: Pillow would hand an EPS file to Ghostscript, which runs programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# those that Pillow has with some versions or packages alone
_OPTIONAL_FORMATS = ("AVIF", "HEIF")
# how files of the latter begin, from their fifth byte on
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")

# What Pillow's readers also raise when a damaged header sends them astray. Not MemoryError, which says nothing about
# the image.
_ASTRAY = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)

# what files and Pillow raise for missing, truncated, malformed and absurdly large images, and for those that need a
# range and have none
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

# An image that is much longer than wide becomes enormous when its shorter side is brought to a model's size: one of
# 1 x 20000 pixels would take 5 GB at 224. Panoramas reach about 20.
LARGEST_RATIO = 50
LARGEST_IMAGE_BYTES = 2**28  # encoded: reading or unpacking more could fill the memory
LARGEST_PIXELS = 89_478_485  # a quarter of a gigabyte in RGB; Pillow's limit

# EXIF's orientation -> what brings the stored pixels upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: AVIF from Pillow 11.3 on, HEIC with the package pillow-heif."""
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ModuleNotFoundError:
        pass  # a message of `Decoder` names the package where an image needs it
    Image.init()
    return (*_FORMATS, *(name for name in _OPTIONAL_FORMATS if name in Image.OPEN))


class Decoder(NamedTuple):
    """How the images of a data set are read: decoder(bytes) -> image.

    channels: 3 for RGB, 1 for grey (luma of ITU-R 601).
    range: (low, high), the values of black and white in images of more than 8 bits a channel; None refuses these.
    option: what messages call the range.
    upright: whether images are turned as their EXIF tag says.
    """

    channels: int = 3
    range: tuple[float, float] | None = None
    option: str = "DATA.RANGE"
    upright: bool = False

    def __call__(self, data: bytes) -> Image.Image:
        """The image in 8 bits. Alpha and palette transparency are dropped; of more than 8 bits, values are scaled as
        float64, (value - low) / (high - low), clipped to 0..1 and rounded to 8 bits.

        Raises one of UNREADABLE, also for more than LARGEST_PIXELS and for sides of more than LARGEST_RATIO to 1, by
        the header, before anything is decoded.
        """
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, of transparency and, before its limit is doubled, of too many pixels
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(io.BytesIO(data), formats=formats()) as image:
                    _check_shape(*image.size)
                    kind = _kind(image)
                    eight = self.converted(self._scaled(image, data, kind) if kind else image)
                    return _turned(eight, image) if self.upright else eight
            except UnidentifiedImageError:
                # its message names the address of the buffer
                raise ValueError(_unknown(data)) from None
            except _ASTRAY as error:
                raise ValueError(f"Pillow cannot read it ({type(error).__name__}: {error})") from error

    def fault(self, file: BinaryIO) -> str:
        """Why the image in an open file cannot be read, as far as its header tells; "" where that is in order."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                with Image.open(file, formats=formats()) as image:
                    _check_shape(*image.size)
                    kind = _kind(image)
                    return self._needs_range(kind) if kind and self.range is None else ""
            except UnidentifiedImageError:
                file.seek(0)
                return _unknown(file.read(12))
            except (*UNREADABLE, *_ASTRAY) as error:
                return " ".join(str(error).split()) or type(error).__name__

    def converted(self, image: Image.Image) -> Image.Image:
        """An 8-bit image of any mode in the decoder's channels."""
        rgb = image.convert("RGB")
        return rgb.convert("L") if self.channels == 1 else rgb

    def _scaled(self, image: Image.Image, data: bytes, kind: str) -> Image.Image:
        """An image of more than 8 bits in 8, grey or RGB."""
        if self.range is None:
            raise ValueError(self._needs_range(kind))
        low, high = self.range
        values = _deep_values(image, data, kind)
        if not np.isfinite(values).all():
            raise ValueError(f"{kind} with values that are not finite")
        if values.min() < values.max() and (values.max() <= low or values.min() >= high):
            raise ValueError(
                f"its values, {values.min():g} to {values.max():g}, are outside of {self.option} {low:g} to {high:g}"
            )
        shares = ((values - low) / (high - low)).clip(0, 1)
        if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            shares = 1 - shares
        return Image.fromarray(np.round(255 * shares).astype(np.uint8))

    def _needs_range(self, kind: str) -> str:
        return (
            f"{kind} has more than 8 bits a channel: say which values are black and white by {self.option}, e.g. "
            "0,4095 for 12 bits"
        )


def _unknown(data: bytes) -> str:
    """What is said of a file of no format that is read, by its first bytes."""
    if data[4:12] in _HEIF_BRANDS:
        return "a HEIC image, which needs the package pillow-heif: pip install pillow-heif"
    return f"not an image of a known format ({', '.join(formats())})"


def _turned(eight: Image.Image, read: Image.Image) -> Image.Image:
    """`eight`, upright by the orientation that the file `read` states. Files that Pillow turns by itself state none any
    more once they are loaded."""
    read.load()
    try:
        turn = _TURNS.get(read.getexif().get(ExifTags.Base.Orientation))
    except (*UNREADABLE, *_ASTRAY):
        return eight  # broken metadata is no reason to refuse an image
    return eight if turn is None else eight.transpose(turn)


def check_size(size: int) -> None:
    """ValueError for a size in bytes that no encoded image has."""
    if not 0 <= size <= LARGEST_IMAGE_BYTES:
        what = "what is no regular file is" if size < 0 else f"{size} bytes are"
        raise ValueError(f"{what} no image: at most {LARGEST_IMAGE_BYTES} bytes are read")


def check_header(data: bytes) -> None:
    """ValueError for an image that is too large, or much too long, to be decoded. Nothing is said of what is no image:
    other readers know formats that this one does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except (*UNREADABLE, *_ASTRAY):
        return
    _check_shape(*size)


def _check_shape(width: int, height: int) -> None:
    if width * height > LARGEST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than {LARGEST_PIXELS}, which could be a decompression bomb")
    if max(width, height) > LARGEST_RATIO * min(width, height):
        raise ValueError(f"{width}x{height} pixels: its sides are more than {LARGEST_RATIO} to 1")


def deep_kind(data: bytes) -> str:
    """What messages call an image of more than 8 bits a channel; "" for any other, and for what is no image. Reads the
    header alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=formats()) as image:
                return _kind(image)
    except (*UNREADABLE, *_ASTRAY):
        return ""


def _kind(image: Image.Image) -> str:
    if image.mode == "F" or image.mode.startswith("I"):
        return f"an image of mode {image.mode}"
    # of 16-bit colour Pillow gives the high bytes, in a mode of 8 bits
    deep = False
    if image.format == "TIFF":
        deep = max(image.tag_v2.get(_BITS, (1,))) > 8
    elif image.format == "PNG":
        deep = ";16" in image.tile[0][3]
    elif image.format == "PPM":
        deep = _largest_value(image) > 255
    return f"a 16-bit {image.mode} image" if deep else ""


def _largest_value(image: Image.Image) -> int:
    """What a PGM or PPM file that is not loaded yet states, where Pillow will scale by it; else 255."""
    codec, _, _, arguments = image.tile[0]
    return arguments[1] if codec in ("ppm", "ppm_plain") else 255


def _deep_values(image: Image.Image, data: bytes, kind: str) -> np.ndarray:
    """The values in the file of an image of more than 8 bits: (H, W), or (H, W, 3), float64."""
    if image.mode != "F" and not image.mode.startswith("I"):
        if image.format != "PNG":
            raise ValueError(f"{kind} is read from PNG alone, not from {image.format}")
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        planes = decode_png(encoded, ImageReadMode.UNCHANGED).numpy().astype(np.float64)  # (C, H, W)
        # the last one of 2 and of 4 is alpha
        return planes[0] if len(planes) < 3 else planes[:3].transpose(1, 2, 0)
    largest = _largest_value(image) if image.format == "PPM" else 255
    values = np.asarray(image)
    if largest > 255:
        # Pillow has made 65535 of the largest value that the file states
        return np.round(values * (largest / 65535))
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "I" and tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,):
        values = values.view(np.uint32)
    return values.astype(np.float64)
