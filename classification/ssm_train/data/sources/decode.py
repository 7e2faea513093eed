"""Encoded bytes -> RGB image, and what counts as unreadable."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

# Only these: Pillow would hand an EPS file to Ghostscript, which runs programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

# What Pillow's readers also raise when a damaged header sends them astray. Not MemoryError, which says nothing about
# the image.
_ASTRAY = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)

# what files and Pillow raise for missing, truncated, malformed and absurdly large images
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


def decode_image(data: bytes) -> Image.Image:
    """The image as 8-bit RGB. Alpha and palette transparency are dropped, 16-bit grey keeps its high byte as 16-bit
    colour does in Pillow; nothing is rotated. Raises one of UNREADABLE, also above Pillow's limit of pixels.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, of transparency and, before its limit is doubled, of too many pixels
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            with image:
                if image.mode.startswith("I"):
                    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
        except UnidentifiedImageError:
            # its message names the address of the buffer
            raise ValueError(f"not an image of a known format ({', '.join(_FORMATS)})") from None
        except _ASTRAY as error:
            raise ValueError(f"Pillow cannot read it ({type(error).__name__}: {error})") from error
