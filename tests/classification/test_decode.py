"""Encoded bytes become RGB images or are unreadable, without a word and whatever is in them."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssm_train.common.decode import UNREADABLE, Decoder, deep_kind
from tests.classification.formats import encoded


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 1, 2, 3 or 4 channels), as Pillow cannot write it."""
    height, width, count = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff16(values: np.ndarray, photometric: int = 2, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of (H, W, channels), little endian, in the width of its values."""
    height, width, count = values.shape
    data = values.tobytes()
    bits = values.dtype.itemsize * 8
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, count, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [
        (273, 4, 1, 0),
        (277, 3, 1, count),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (339, 3, 1, sample_format),
    ]
    end = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, kind, number, value in tags:
        value = end if tag == 258 and count > 2 else end + 8 if tag == 273 else value
        entries += struct.pack("<HHII", tag, kind, number, value)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<4H", *[bits] * 4) + data


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
EIGHT = np.round(RAMP / 4095 * 255).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP.T], 2)
ALPHA = np.full_like(RAMP, 9)
PGM = {
    "P5 4095": b"P5 64 64 4095\n" + RAMP.astype(">u2").tobytes(),
    "P5 65535": b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(),
    "P2 4095": b"P2 64 64 4095\n" + " ".join(map(str, RAMP.flat)).encode(),
}
# what -> file, what messages call it, values in 8 bits by the range 0 to 4095
DEEP = {
    "I;16 PNG": (encoded(Image.fromarray(RAMP)), "mode I;16", EIGHT),
    "I;16 TIFF": (encoded(Image.fromarray(RAMP), "TIFF"), "mode I;16", EIGHT),
    "I;16 TIFF, LZW": (encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"), "mode I;16", EIGHT),
    "I;16B TIFF": (encoded(Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()), "TIFF"), "I;16B", EIGHT),
    "white is zero": (tiff16(RAMP[..., None], photometric=0), "mode I;16", 255 - EIGHT),
    "signed": (
        tiff16((RAMP.astype(np.int16) - 9)[..., None], 1, 2),
        "mode I",
        np.round((RAMP - 9.0).clip(0) / 4095 * 255),
    ),
    "I TIFF": (encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "mode I", EIGHT),
    "F TIFF": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "mode F", EIGHT),
    **{name: (data, "mode I", EIGHT) for name, data in PGM.items()},
    "F PFM": (encoded(Image.fromarray(RAMP.astype(np.float32)), "PPM"), "mode F", EIGHT),
    "RGB PNG": (png16(COLOUR), "16-bit RGB", np.round(COLOUR / 4095 * 255)),
    "RGBA PNG": (png16(np.dstack([COLOUR, ALPHA])), "16-bit RGBA", np.round(COLOUR / 4095 * 255)),
    "LA PNG": (png16(np.dstack([RAMP, ALPHA])), "16-bit RGBA", EIGHT),
}


@pytest.mark.parametrize("what", DEEP)
def test_more_than_8_bits_are_scaled_by_a_range_or_refused(what):
    data, kind, expected = DEEP[what]
    assert kind in deep_kind(data)
    with pytest.raises(ValueError, match=rf"{kind}.* has more than 8 bits.*by DATA.RANGE, e.g. 0,4095"):
        Decoder()(data)
    image = Decoder(range=(0, 4095))(data)
    expected = np.broadcast_to(expected.reshape(64, 64, -1), (64, 64, 3))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    assert len(np.unique(np.asarray(image))) > 250
    grey = Decoder(1, (0, 4095))(data)
    assert grey.mode == "L" and np.array_equal(np.asarray(grey), np.asarray(image.convert("L")))


def test_a_range_is_cut_to_before_the_image_is():
    half = Decoder(range=(1000.5, 2000.5))(DEEP["I;16 PNG"][0])
    assert np.array_equal(np.asarray(half)[..., 0], np.round((RAMP - 1000.5).clip(0, 1000) / 1000 * 255))
    wide = np.linspace(0, 2**32 - 1, 4096, dtype=np.uint32).reshape(64, 64, 1)
    unsigned = Decoder(range=(0, 2**32 - 1))(tiff16(wide, 1))
    assert np.array_equal(np.asarray(unsigned)[..., :1], np.round(wide / (2**32 - 1) * 255))
    share = encoded(Image.fromarray((RAMP / 4095).astype(np.float32)), "TIFF")
    assert np.array_equal(np.asarray(Decoder(1, (0, 1))(share)), EIGHT)


def test_what_a_range_cannot_save():
    hole = RAMP.astype(np.float32)
    hole[3, 4] = np.nan
    for data, reason in (
        (encoded(Image.fromarray(hole), "TIFF"), "mode F with values that are not finite"),
        (DEEP["F TIFF"][0], r"its values, 0 to 4095, are outside of DATA.RANGE 5000 to 6000"),
        (tiff16(COLOUR), "a 16-bit RGB image is read from PNG alone, not from TIFF"),
        (
            b"P6 64 64 4095\n" + COLOUR.astype(">u2").tobytes(),
            "a 16-bit RGB image is read from PNG alone, not from PPM",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            Decoder(range=(5000, 6000))(data)
    # black as a whole is no mistake
    black = Decoder(1, (0, 4095))(encoded(Image.fromarray(0 * RAMP)))
    assert black.getextrema() == (0, 0)


def test_every_mode_becomes_rgb_without_a_word(capfd):
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    rgb, grey = Image.fromarray(colour), Image.fromarray(colour[..., 0])
    alpha = Image.fromarray(colour[..., 1])
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(16)
    grey_rgb = np.repeat(colour[..., :1], 3, axis=2)
    cmyk = rgb.convert("CMYK")
    cases = [
        (encoded(rgb), colour),
        (encoded(rgba), colour),
        (encoded(grey), grey_rgb),
        (encoded(Image.merge("LA", (grey, alpha))), grey_rgb),
        (encoded(palette), np.asarray(palette.convert("RGB"))),
        (encoded(palette, transparency=bytes(range(16))), np.asarray(palette.convert("RGB"))),
        (encoded(palette, transparency=3), np.asarray(palette.convert("RGB"))),
        (encoded(Image.merge("LA", (grey, alpha)), "TIFF"), grey_rgb),
        (encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        (encoded(grey.point(lambda value: value > 99, "1")), 255 * (grey_rgb > 99).astype(np.uint8)),
        (encoded(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        (encoded(rgb, "WEBP", lossless=True), colour),
        (encoded(rgb, "BMP"), colour),
        (encoded(rgb, "PPM"), colour),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (data, expected) in enumerate(cases):
            assert deep_kind(data) == ""
            # a range is for more than 8 bits
            for decoder in (Decoder(), Decoder(range=(0, 4095))):
                image = decoder(data)
                assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected), number
            single = np.asarray(Decoder(channels=1)(data))
            assert np.array_equal(single, np.asarray(Image.fromarray(expected).convert("L"))), number
        jpeg = encoded(cmyk, "JPEG", quality=95)
        assert np.array_equal(np.asarray(Decoder()(jpeg)), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        # broken metadata is no reason to refuse the image, nor to complain
        assert np.asarray(Decoder()(encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff"))).shape == (5, 7, 3)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image(monkeypatch):
    rgb = Image.new("RGB", (60, 60))
    eps, bomb = encoded(rgb, "EPS"), encoded(rgb)
    text_bomb = PngInfo()
    text_bomb.add_text("a", "b" * 2**26, zip=True)
    cut = encoded(Image.effect_noise((60, 60), 99), "JPEG")[:-100]
    assert deep_kind(b"hello" * 100) == ""
    for data, reason in (
        (b"", "not an image of a known format"),
        (b"hello" * 100, "not an image of a known format"),
        (eps, "not an image of a known format"),
        (encoded(rgb, pnginfo=text_bomb), "Decompressed data too large"),
        (cut, "truncated"),
    ):
        with pytest.raises(UNREADABLE, match=reason):
            Decoder()(data)
    for limit in (3599, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UNREADABLE, match=r"Image size \(3600 pixels\) exceeds limit"):
            Decoder()(bomb)


def test_random_damage_to_images_is_unreadable_or_an_image():
    chance = random.Random(0)
    noise = Image.merge("RGB", [Image.effect_noise((24, 24), 80)] * 3)
    kinds = [encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    kinds += [encoded(noise, "TIFF", compression="tiff_lzw"), encoded(noise.convert("CMYK"), "JPEG")]
    deep = np.asarray(noise.convert("I")) * 4
    kinds += [encoded(Image.fromarray(deep.astype(kind)), "TIFF") for kind in (np.uint16, np.int32, np.float32)]
    kinds += [png16(np.stack([deep] * 3, 2)), encoded(Image.fromarray(deep.astype(np.uint16)))]
    failed = 0
    for data in kinds:
        for _ in range(80):
            damaged = bytearray(data)
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.choice([chance.randrange(len(data)), chance.randrange(60)])] = chance.randrange(256)
            try:
                assert Decoder(range=(0, 999))(bytes(damaged)).mode == "RGB"
            except UNREADABLE:
                failed += 1
    assert 100 < failed < 1100
