"""Images that cross the bus in 8 bits: normalised and erased as the loader would have done it."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ssm_train.common.distributed import World
from ssm_train.common.seeding import seed_step
from ssm_train.config.load import load_config
from ssm_train.data.build import scan_split, train_loader
from ssm_train.data.on_device import OnDevice
from ssm_train.data.transforms import STATISTICS, train_transform
from ssm_train.start import prepare
from ssm_train.step.engine import training_loss

CPU = torch.device("cpu")


def config(tiny_cfg, *opts: object):
    return load_config(str(tiny_cfg), [str(option) for option in opts])


def photo(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def both_ways(cfg, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """By the loader alone, and in two parts."""
    found = []
    for raw in (False, True):
        seed_step(1, 2, 3)
        found.append(train_transform(cfg, raw)(image))
    whole, parts = found
    assert parts.dtype == torch.uint8 and parts.shape == whole.shape
    return whole, OnDevice(cfg, CPU)(parts[None])[0]


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_the_same_numbers_in_two_parts(tiny_cfg, size, mode, channels):
    opts = ("DATA.IMG_SIZE", size, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.HFLIP", 0.5)
    cfg = config(tiny_cfg, *opts, "MODEL.KWARGS.in_chans", channels)
    whole, parts = both_ways(cfg, photo(mode))
    assert whole.shape == (channels, size, size) and whole.std() > 0.1
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)


def test_erasing(tiny_cfg):
    """Of all images at 1, of a quarter at 0.25; by the seed of the step, each image at a place of its own."""
    grey = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in STATISTICS[3])
    plain = ((128 / 255 - mean) / std)[:, None, None]

    def erased(share: float, seed: int) -> torch.Tensor:
        seed_step(seed, 0, 0)
        return (OnDevice(config(tiny_cfg, "AUG.REPROB", share), CPU)(grey) - plain).abs().sum(1) > 1e-3

    always = erased(1.0, 0)
    areas = always.flatten(1).float().mean(1)
    assert (areas > 0.01).all() and (areas < 0.35).all() and areas.std() > 0.03
    assert torch.equal(always, erased(1.0, 0)) and not torch.equal(always, erased(1.0, 1))
    assert 70 < erased(0.25, 0).flatten(1).any(1).sum() < 130
    assert not erased(0.0, 0).any()


def test_who_gets_8_bits(tiny_cfg):
    """Trainings on a GPU; on the CPU the loader's workers do all of it."""
    cfg = config(tiny_cfg, "AUG.REPROB", 0.5)
    batches = {}
    for name in ("cpu", "cuda"):
        loader = train_loader(cfg, scan_split(cfg, "train"), World(0, 1, torch.device(name)))
        loader.batch_sampler.set_position(0, 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # for want of a GPU
            batches[name] = next(iter(loader))
    assert batches["cpu"].images.dtype == torch.float32 and batches["cuda"].images.dtype == torch.uint8
    assert torch.equal(batches["cpu"].targets, batches["cuda"].targets)


def test_the_loss_of_either(tiny_cfg):
    cfg = config(tiny_cfg)
    run = prepare(cfg, World(0, 1, CPU), 5)
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS[3])
    targets = torch.tensor([0, 1, 2, 0])
    want = training_loss(run, (raw.float() / 255 - mean) / std, targets)
    torch.testing.assert_close(training_loss(run, raw, targets), want, rtol=1e-5, atol=1e-6)
