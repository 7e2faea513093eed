"""C3P: connectivity maps of masks and the way back, against loops."""

import pytest
import torch

from segmentation.dual_sam.connectivity import MAPS, OFFSETS, connectivity, mask_probability


def random_masks(count=6, height=9, width=11, density=0.5):
    """With animals on the border."""
    return (torch.rand(count, height, width) < density).float()


def rectangles(thickness, height=24, width=31, shapes=4):
    """A union of rectangles whose thin side is `thickness`, some of them over the border."""
    mask = torch.zeros(height, width)
    for _ in range(shapes):
        long = int(torch.randint(thickness, 15, ()))
        rows, columns = (thickness, long) if torch.rand(()) < 0.5 else (long, thickness)
        top, left = int(torch.randint(0, height - 1, ())), int(torch.randint(0, width - 1, ()))
        mask[top : top + max(rows, 2), left : left + max(columns, 2)] = 1
    return mask[None]


def test_opposite_maps_are_seven_apart():
    assert MAPS == 8 and all(OFFSETS[7 - i] == (-dy, -dx) for i, (dy, dx) in enumerate(OFFSETS))


def test_targets_are_those_of_a_loop():
    masks = random_masks()
    maps = connectivity(masks)
    batch, height, width = masks.shape
    expected = torch.zeros(batch, 8, height, width)
    for b in range(batch):
        for i, (dy, dx) in enumerate(OFFSETS):
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        expected[b, i, y, x] = masks[b, y, x] * masks[b, y + dy, x + dx]
    assert torch.equal(maps, expected)


def test_decoding_is_that_of_a_loop():
    maps = torch.rand(2, 8, 7, 6)
    batch, _, height, width = maps.shape
    expected = torch.zeros(batch, height, width)
    for b in range(batch):
        for i, (dy, dx) in enumerate(OFFSETS):
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        both = maps[b, i, y, x] * maps[b, 7 - i, y + dy, x + dx]
                        expected[b, y, x] = max(expected[b, y, x], both)
    assert torch.equal(mask_probability(maps), expected)


@pytest.mark.parametrize("seed", range(20))
def test_decoding_inverts_shapes_of_two_pixels(seed):
    torch.manual_seed(seed)
    mask = rectangles(thickness=2)
    assert mask.any() and torch.equal(mask_probability(connectivity(mask)), mask)


def test_a_pixel_alone_has_no_connection():
    mask = torch.zeros(1, 5, 5)
    mask[0, 2, 2] = 1
    assert not mask_probability(connectivity(mask)).any()


def test_legacy_looks_one_pixel_away_for_the_other_end_of_two():
    """Pixels that are connected at a distance of two only: legacy finds no other end."""
    mask = torch.zeros(1, 5, 8)
    mask[0, 2, [1, 3, 5]] = 1
    maps = connectivity(mask)
    assert torch.equal(mask_probability(maps), mask)
    assert not mask_probability(maps, legacy=True).any()
    # maps 0 and 2 look below and to the right of where they should, 5 and 7 one pixel short
    wrong = {0: (1, 0), 2: (0, 1), 5: (0, 1), 7: (1, 0)}
    for i, (dy, dx) in enumerate(OFFSETS):
        dy, dx = wrong.get(i, (dy, dx))
        single = torch.zeros(1, 8, 7, 7)
        single[0, i, 3, 3] = single[0, 7 - i, 3 + dy, 3 + dx] = 1
        assert mask_probability(single, legacy=True)[0, 3, 3] == 1, i
    # where there is a neighbour next to each, the maximum hides it
    whole = rectangles(thickness=2)
    assert torch.equal(mask_probability(connectivity(whole), legacy=True), whole)
