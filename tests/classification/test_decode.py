"""Encoded bytes become RGB images or are unreadable, without a word and whatever is in them."""

import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ssm_train.common.decode import UNREADABLE, decode_image
from tests.classification.formats import encoded


def test_every_mode_becomes_rgb_without_a_word(capfd):
    colour = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    rgb, grey = Image.fromarray(colour), Image.fromarray(colour[..., 0])
    alpha = Image.fromarray(colour[..., 1])
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(16)
    wide = colour[..., 0].astype(np.uint16) << 8 | 77
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
        (encoded(Image.fromarray(wide)), grey_rgb),
        (encoded(Image.fromarray(wide), "TIFF"), grey_rgb),
        (encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), grey_rgb),
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
            image = decode_image(data)
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected), number
        jpeg = encoded(cmyk, "JPEG", quality=95)
        assert np.array_equal(np.asarray(decode_image(jpeg)), np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")))
        # broken metadata is no reason to refuse the image, nor to complain
        assert np.asarray(decode_image(encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff"))).shape == (5, 7, 3)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image(monkeypatch):
    rgb = Image.new("RGB", (60, 60))
    eps, bomb = encoded(rgb, "EPS"), encoded(rgb)
    text_bomb = PngInfo()
    text_bomb.add_text("a", "b" * 2**26, zip=True)
    cut = encoded(Image.effect_noise((60, 60), 99), "JPEG")[:-100]
    for data, reason in (
        (b"", "not an image of a known format"),
        (b"hello" * 100, "not an image of a known format"),
        (eps, "not an image of a known format"),
        (encoded(rgb, pnginfo=text_bomb), "Decompressed data too large"),
        (cut, "truncated"),
    ):
        with pytest.raises(UNREADABLE, match=reason):
            decode_image(data)
    for limit in (3599, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UNREADABLE, match=r"Image size \(3600 pixels\) exceeds limit"):
            decode_image(bomb)


def test_random_damage_to_images_is_unreadable_or_an_image():
    chance = random.Random(0)
    noise = Image.merge("RGB", [Image.effect_noise((24, 24), 80)] * 3)
    kinds = [encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    kinds += [encoded(noise, "TIFF", compression="tiff_lzw"), encoded(noise.convert("CMYK"), "JPEG")]
    failed = 0
    for data in kinds:
        for _ in range(80):
            damaged = bytearray(data)
            for _ in range(chance.randrange(1, 6)):
                damaged[chance.choice([chance.randrange(len(data)), chance.randrange(60)])] = chance.randrange(256)
            try:
                assert decode_image(bytes(damaged)).mode == "RGB"
            except UNREADABLE:
                failed += 1
    assert 100 < failed < 700
