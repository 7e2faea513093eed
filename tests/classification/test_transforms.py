"""Augmentations and validation crops: against timm, torchvision and PIL."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from ssm_train.config.defaults import default_config
from ssm_train.data.transforms import eval_transform, posterize, train_transform

BICUBIC = InterpolationMode.BICUBIC
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def config(**keys):
    """Defaults with e.g. AUG__CROP="simple"."""
    cfg = default_config()
    for key, value in keys.items():
        section, name = key.split("__")
        cfg[section][name] = value
    return cfg


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise: no two places look alike."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1)
    return Image.fromarray((127 + 90 * waves + generator.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8))


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def names(transform) -> list[str]:
    return [type(part).__name__ for part in transform.transforms]


def test_defaults_are_those_of_timm_bit_for_bit():
    ours = train_transform(config())
    published = create_transform(
        input_size=224,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    image = photo(300, 260)
    for number in range(5):
        seed(number)
        one = ours(image)
        seed(number)
        assert torch.equal(one, published(image))


@pytest.mark.parametrize("policy", ["rand-m10-n6-inc1", "augmix-m10-w2", "original", "v0"])
def test_policies_work_at_the_highest_magnitude(policy):
    """Where timm's posterisation keeps no bit, as the default policy does in one of 40 operations of its kind."""
    transform, image = train_transform(config(AUG__AUTO_AUGMENT=policy)), photo(60, 50)
    for number in range(30):
        seed(number)
        assert transform(image).isfinite().all()
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3 and posterize(image, 8) == image
    assert np.array_equal(np.asarray(posterize(image, 2)), np.asarray(image) & 0b11000000)


def test_default_validation_bit_for_bit():
    image = photo(300, 260)
    resized = transforms.Resize(256, BICUBIC)(image)
    assert resized.size == (295, 256)
    left, top = round((295 - 224) / 2), 16
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224))).copy()
    expected = transforms.functional.normalize(
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, MEAN.flatten().tolist(), STD.flatten().tolist()
    )
    assert torch.equal(eval_transform(config())(image), expected)


@pytest.mark.parametrize("size", [96, 192, 224, 256, 288, 384, 448, 512, 768, 1024])
def test_validation_keeps_the_share_of_the_shorter_side(size):
    resize, crop = eval_transform(config(DATA__IMG_SIZE=size)).transforms[:2]
    assert (resize.size, crop.size) == (int(256 / 224 * size), (size, size))
    resize, crop = eval_transform(config(DATA__IMG_SIZE=size, DATA__CROP_RATIO=0.95)).transforms[:2]
    assert (resize.size, crop.size) == (int(size / 0.95), (size, size))


def test_validation_of_the_whole_image():
    image = photo(80, 50)
    tensor = eval_transform(config(DATA__IMG_SIZE=48, DATA__CROP_RATIO=1.0))(image)
    pixels = torch.from_numpy(np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).copy())
    torch.testing.assert_close(tensor, (pixels.permute(2, 0, 1) / 255 - MEAN) / STD)


def test_simple_crop_is_a_shifted_square_of_the_shorter_side():
    transform = train_transform(config(DATA__IMG_SIZE=48, AUG__CROP="simple"))
    assert names(transform)[:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    image = photo(80, 60)
    whole = np.asarray(image.resize((64, 48), Image.Resampling.BICUBIC))
    padded = np.pad(whole, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    corners = set()
    for number in range(40):
        seed(number)
        out = np.asarray(transform.transforms[1](transform.transforms[0](image)))
        found = [
            (top, left)
            for top in range(9)
            for left in range(25)
            if np.array_equal(out, padded[top : top + 48, left : left + 48])
        ]
        assert len(found) == 1
        corners.update(found)
    tops, lefts = ({corner[i] for corner in corners} for i in (0, 1))
    assert len(corners) > 30 and tops == set(range(9)) and len(lefts) > 18 and max(lefts) > 20


def test_three_augment_takes_one_of_three_always():
    transform = train_transform(config(AUG__THREE_AUGMENT=True, AUG__COLOR_JITTER=0.3, AUG__REPROB=0.0))
    assert names(transform) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "AutoAugment", "ColorJitter", "MaybeToTensor",
        "Normalize",
    ]  # fmt: skip
    jitter = transform.transforms[3]
    assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.7, 1.3),) * 3 and jitter.hue is None
    augment = next(part for part in transform.transforms if isinstance(part, AutoAugment))
    image = photo(60, 40)
    grey, solar = image.convert("L").convert("RGB"), ImageOps.solarize(image, 128)
    counts, radii = {"grey": 0, "solarised": 0, "blurred": 0}, []
    for number in range(150):
        seed(number)
        out = augment(image)
        if out == grey:
            counts["grey"] += 1
        elif out == solar:
            counts["solarised"] += 1
        else:
            # the radius is drawn after the choice
            seed(number)
            random.choice(range(3))
            radii.append(random.uniform(0.1, 2.0))
            assert out == image.filter(ImageFilter.GaussianBlur(radii[-1])), number
            counts["blurred"] += 1
    assert all(30 < count < 70 for count in counts.values()), counts
    assert min(radii) < 0.4 and max(radii) > 1.7


def test_three_augment_without_jitter_and_with_erasing():
    transform = train_transform(config(AUG__THREE_AUGMENT=True, AUG__COLOR_JITTER=0.0, AUG__CROP="simple"))
    assert names(transform) == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "AutoAugment", "MaybeToTensor", "Normalize", "RandomErasing",
    ]  # fmt: skip
    assert transform(photo(300, 260)).shape == (3, 224, 224)
