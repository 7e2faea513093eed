"""Scenes of digits: choices, splits, masks, boxes and how digits hide each other."""

import hashlib
import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ssm_mm import digit_scenes
from ssm_mm.digit_scenes import FEWEST, MIN_VISIBLE, MOST, SPLITS, Choices, Instance, box_of, make_scene, scans_of
from ssm_train.data.digits import split_digits


@pytest.fixture(scope="module")
def scenes():
    return {split: [make_scene(split, number) for number in range(30)] for split in SPLITS}


def test_choices_are_hashes_and_fill_their_range():
    bits = [int(hashlib.sha256(f"a key/{i}".encode()).hexdigest()[:16], 16) for i in range(3)]
    choices = Choices("a key")
    assert [choices.between(-5, 4) for _ in range(3)] == [-5 + 10 * b // 2**64 for b in bits] == [-5, -5, 4]
    drawn = [choices.of("xyz") for _ in range(300)]
    assert all(80 < drawn.count(letter) < 120 for letter in "xyz")


def test_split_is_that_of_the_classification():
    targets = load_digits().target
    splits = split_digits(targets)
    for split, digit in itertools.product(SPLITS, range(10)):
        expected = [i for i, of in enumerate(targets) if of == digit and splits[i] == split]
        assert list(scans_of(split, digit)) == expected
    assert sum(len(scans_of("val", digit)) for digit in range(10)) == 355


def test_scenes_hold_three_to_eight_digits_of_their_own_split(scenes):
    targets = load_digits().target
    splits = np.array(split_digits(targets))
    for split, of_split in scenes.items():
        counts = {len(scene.instances) for scene in of_split}
        assert counts == set(range(FEWEST, MOST + 1))
        instances = [instance for scene in of_split for instance in scene.instances]
        assert {instance.digit for instance in instances} == set(range(10))
        for instance in instances:
            assert targets[instance.scan] == instance.digit and splits[instance.scan] == split
        assert len({scene.image.shape for scene in of_split}) == 9
        assert {side for scene in of_split for side in scene.image.shape[:2]} == {128, 144, 160}


def test_masks_are_disjoint_and_at_most_two_fifths_of_a_digit_are_hidden(scenes):
    hidden = 0
    for scene in scenes["train"] + scenes["val"]:
        masks = [instance.mask for instance in scene.instances]
        assert np.sum(masks, axis=0).max() == 1
        shares = [instance.mask.sum() / instance.ink for instance in scene.instances]
        assert min(shares) >= MIN_VISIBLE and shares[-1] == 1
        hidden += sum(share < 1 for share in shares)
        tallest = [box_of(mask)[3] for mask, share in zip(masks, shares, strict=True) if share == 1]
        assert min(tallest) >= 20 and max(tallest) <= 56
    assert hidden > 30  # there is occlusion


def test_masks_lie_on_the_bright_pixels(scenes):
    for scene in scenes["train"]:
        luma = scene.image @ np.array([0.299, 0.587, 0.114])
        inked = np.any([instance.mask for instance in scene.instances], axis=0)
        assert luma[~inked].mean() < 60
        for instance in scene.instances:
            assert luma[instance.mask].mean() > 90
        bright = luma > 115  # brighter than canvas and half-covered pixels
        assert (inked & bright).sum() > 0.95 * bright.sum()


def test_the_front_digit_hides_those_behind(monkeypatch):
    painted, paint = [], digit_scenes._paint
    monkeypatch.setattr(
        digit_scenes, "_paint", lambda image, ink, colour: painted.append(ink) or paint(image, ink, colour)
    )
    for number in range(20):
        painted.clear()
        instances = make_scene("train", number).instances
        inks = [coverage >= 96 for coverage in painted]
        for i, (instance, ink) in enumerate(zip(instances, inks, strict=True)):
            assert instance.ink == ink.sum()
            assert np.array_equal(instance.mask, ink & ~np.any(inks[i + 1 :], axis=0))


def test_what_is_legible():
    old, new = np.zeros((2, 40, 40), bool)
    old[:10, :10] = True
    new[30:, 30:] = True
    for visible, legible in ((59, False), (60, True)):
        behind = old & (np.arange(old.size).reshape(old.shape) < 40 * (visible // 10) + visible % 10)
        before, after = Instance(0, 0, old, 100), Instance(0, 0, behind, 100)
        assert behind.sum() == visible and digit_scenes._is_legible(new, [before], [after]) == legible
    for left, legible in ((6, False), (7, True)):  # a box of 20x10 that shares 40 or 30 of the 100 pixels of the other
        new[:] = False
        new[:20, left : left + 10] = True
        assert digit_scenes._is_legible(new, [before], [before]) == legible


def test_the_stream_of_scenes_is_version_one():
    # the first digit of a scene needs no arithmetic on pixels: another Pillow gives the same
    assert [make_scene("train", number).instances[0][:2] for number in range(4)] == [
        (1, 1508),
        (2, 1742),
        (0, 1029),
        (6, 532),
    ]
    assert [make_scene("val", number).instances[0][:2] for number in range(4)] == [
        (1, 1334),
        (4, 507),
        (9, 1740),
        (0, 386),
    ]


def test_a_scene_does_not_depend_on_the_others():
    image = make_scene("val", 5).image
    assert np.array_equal(make_scene("val", 5).image, image)
    for split, number in (("val", 6), ("train", 5)):
        other = make_scene(split, number).image
        assert other.shape != image.shape or not np.array_equal(other, image)
    with pytest.raises(ValueError, match="'test' is not one of train, val"):
        make_scene("test", 0)


def test_box():
    mask = np.zeros((5, 7), bool)
    mask[1, 2] = mask[3, 5] = True
    assert box_of(mask) == (2, 1, 4, 3)
