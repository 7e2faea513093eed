"""The published counts of parameters and multiply-accumulates (MACs)."""

import functools
import math

import pytest
import timm
import torch

from ssm_models import VSSM, DenseVSSM, model_card
from ssm_models.model_card import PUBLISHED_MACS, registered_models

PARAMETERS = {
    "vanilla_vmamba_tiny": 22_893_448,
    "vanilla_vmamba_small": 44_417_416,
    "vanilla_vmamba_base": 76_254_056,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vim_tiny_patch16_224": 7_148_008,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_224": 25_796_584,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vim_base_patch16_224": 97_598_440,
    "vssd_micro": 13_512_964,
    "vssd_tiny": 24_270_724,
    "vssd_small": 40_075_650,
    "vssd_base": 88_823_151,
    "vssd_tiny_iccv2025": 28_192_936,
    "vssd_small_iccv2025": 50_417_512,
    "vmamba_tiny_0220": 32_484_904,
    "vmamba_tiny_m2": 25_340_296,
    "vmamba_small_m2": 39_079_816,
    "vmamba_base_m2": 67_527_528,
    "vmamba_nano": 379_786,
    "vim_nano": 252_682,
    "vssd_nano": 506_072,
    "vssd_nano_iccv2025": 374_040,
}

card = functools.lru_cache(model_card)


def named(prefix: str) -> list[str]:
    return [name for name in PARAMETERS if name.startswith(prefix)]


def part(found, *names: str) -> int:
    """MACs of the operators whose name has one of `names` in it."""
    return sum(n for operator, n in found.macs_by_operator.items() if any(name in operator for name in names))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    assert card(name).parameters == PARAMETERS[name]


def test_every_registered_model_has_its_numbers():
    assert set(registered_models()) == set(PARAMETERS)
    ours = {name for name in PARAMETERS if name.endswith(("_0220", "_m2", "_nano", "_iccv2025"))}
    assert set(PARAMETERS) - set(PUBLISHED_MACS) == set(named("vim")) | ours


@pytest.mark.parametrize(
    "name, macs",
    {
        "vmamba_tiny_s2l5": 4_857_742_080,
        "vmamba_small_s2l15": 8_715_774_720,
        "vmamba_base_s2l15": 15_358_944_256,
        "vmamba_tiny_s1l8": 4_905_609_984,
        "vmamba_small_s1l20": 8_612_211_456,
        "vmamba_base_s1l20": 15_220_859_904,
    }.items(),
)
def test_vmamba_v2(name, macs):
    found = card(name)
    assert found.macs == found.macs_official == found.macs_published == macs
    assert sum(found.macs_by_operator.values()) == macs


def error_of_einsum(macs: int) -> int:
    """What fvcore's count of an einsum is off by: it reads numpy's report, twice as much in four digits."""
    return math.floor(float(f"{2 * macs:.3e}") / 2) - macs


@pytest.mark.parametrize(
    "name, published, dim, depths",
    [
        ("vanilla_vmamba_tiny", 5_626_895_040, 96, (2, 2, 9, 2)),
        ("vanilla_vmamba_small", 11_231_522_784, 96, (2, 2, 27, 2)),
        ("vanilla_vmamba_base", 18_020_115_136, 128, (2, 2, 27, 2)),
    ],
)
def test_vmamba_v1_but_for_the_rounding_of_its_einsums(name, published, dim, depths):
    """Two of them in every block: to step sizes, B and C (x_proj), and from R numbers to the step sizes (dt_projs)."""
    error, n_state = 0, 16
    for i, depth in enumerate(depths):
        tokens, inner, rank = 56**2 // 4**i, 2 * dim * 2**i, math.ceil(dim * 2**i / 16)
        projections = 4 * tokens * inner * (rank + 2 * n_state), 4 * tokens * inner * rank
        error += depth * sum(map(error_of_einsum, projections))
    found = card(name)
    assert found.macs + error == found.macs_published == published
    assert found.macs == found.macs_official and abs(error) < 3e-5 * published


@pytest.mark.parametrize(
    "name, published, rounded, true, width, depth",
    [
        ("vssd_micro", 2_305_701_632, 2.306, 2.407, 384, 4),
        ("vssd_tiny", 4_475_384_800, 4.475, 4.694, 512, 4),
        ("vssd_small", 7_365_999_448, 7.366, 7.756, 512, 5),
        ("vssd_base", 16_066_232_896, 16.066, 16.720, 768, 5),
    ],
)
def test_vssd(name, published, rounded, true, width, depth):
    found = card(name)
    error = 2 * depth * error_of_einsum(49 * 49 * width)  # both products of the attention of the last stage
    assert found.macs_official + error == found.macs_published == published
    assert round(found.macs_official / 1e9, 3) == rounded and round(found.macs / 1e9, 3) == true
    assert found.macs_recurrence == found.macs and part(found, "attention") == 2 * depth * 49 * 49 * width


@pytest.mark.parametrize("name, rounded, depths", [("tiny", 5.02, (2, 2, 8)), ("small", 8.12, (2, 4, 15))])
def test_vssd_of_iccv_2025(name, rounded, depths):
    """Its counter makes no mistake: every head has keys of its own. The normaliser is a head of one channel more."""
    found = card(f"vssd_{name}_iccv2025")
    assert round(found.macs / 1e9, 2) == rounded
    assert found.macs_official == found.macs == found.macs_recurrence and found.macs_published is None
    stages = zip(depths, (56, 28, 14), (96, 192, 384), (12, 24, 48), (4, 4, 8), strict=True)
    scans = sum(depth * 2 * side**2 * n_state * (dim + heads) for depth, side, dim, n_state, heads in stages)
    assert part(found, "nc_ssd") == scans


@pytest.mark.parametrize(
    "name, dim, patches, linear, with_conv, with_scan",
    [
        ("vim_tiny_patch16_224", 192, 14**2, 1.28, 1.29, 1.82),
        ("vim_tiny_patch16_stride8_224", 192, 27**2, 4.74, 4.79, 6.73),
        ("vim_small_patch16_224", 384, 14**2, 4.82, 4.85, 5.90),
        ("vim_small_patch16_stride8_224", 384, 27**2, 17.9, 18.0, 21.9),
        ("vim_base_patch16_224", 768, 14**2, 18.7, 18.8, 20.9),
    ],
)
def test_vim(name, dim, patches, linear, with_conv, with_scan):
    found, tokens, inner, rank = card(name), patches + 1, 2 * dim, dim // 16
    skip = 24 * 2 * tokens * inner
    scan, conv = 24 * 2 * tokens * inner * 9 * 16, part(found, "causal_conv1d")
    sums = [found.macs - conv - scan - skip, conv, scan]
    totals = [sum(sums[: i + 1]) / 1e9 for i in range(3)]
    assert [float(f"{total:.3g}") for total in totals] == [linear, with_conv, with_scan]

    directions = inner * (rank + 32) + rank * inner + 4 * inner + 9 * 16 * inner + inner
    block = tokens * (dim * 2 * inner + 2 * directions + inner * dim)
    assert found.macs == 24 * block + patches * 768 * dim + dim * 1000
    assert found.macs - found.macs_recurrence == 24 * 2 * tokens * inner * 16 * 11 // 2
    assert found.macs_published is None and "no counter of its own" in found.convention


@pytest.mark.parametrize(
    "name, hardware_aware, naive",
    [
        ("vanilla_vmamba_tiny", 285.9, 262.1),
        ("vanilla_vmamba_small", 400.3, 357.0),
        ("vanilla_vmamba_base", 539.8, 482.1),
    ],
)
def test_published_detectors_differ_by_the_scans(name, hardware_aware, naive):
    """VMamba's Mask R-CNN in G at 1280x800, with and without the hardware-aware algorithm: all else is the same."""
    found = card(name, (3, 800, 1280))
    assert round((found.macs - found.macs_recurrence) / 1e9, 1) == round(hardware_aware - naive, 1)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_macs_grow_linearly_with_the_pixels(name):
    """All but VSSD's attention, which grows with their square."""
    cards = [card(name, (3, height, width)) for height, width in ((32, 32), (32, 64), (64, 64))]
    attention = [part(found, "attention") for found in cards]
    linear = [found.macs - quadratic for found, quadratic in zip(cards, attention, strict=True)]
    assert linear[2] - linear[1] == 2 * (linear[1] - linear[0]) > 0
    assert [n / max(attention[0], 1) for n in attention] == ([1, 4, 16] if name == "vssd_nano" else [0, 0, 0])
    assert [found.parameters for found in cards] == [cards[0].parameters] * 3


@pytest.mark.parametrize("kwargs", [{"scan_impl": "reference"}, {"norm_layer": "ln"}, {}])
def test_given_model_is_counted_and_left_alone(kwargs):
    model = timm.create_model("vmamba_nano", **kwargs).half().train()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    found, by_name = model_card(model, (3, 64, 96)), card("vmamba_nano", (3, 64, 96))
    assert (found.macs, found.macs_recurrence, found.parameters) == (
        by_name.macs,
        by_name.macs_recurrence,
        by_name.parameters,
    )
    assert found.name == "VSSM" and found.macs_published is None and found.input_size == (3, 64, 96)
    assert model.training and model.layers[0].blocks[0].op.impl == kwargs.get("scan_impl", "auto")
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_a_number_is_the_side_of_a_square(name):
    assert model_card(name, 32) == card(name, (3, 32, 32))
    gray = timm.create_model(name, in_chans=1)
    assert model_card(gray, 48) == model_card(gray, (1, 48, 48))
    with pytest.raises(ValueError, match=r"input_size=\(3, 0, 0\) is not"):
        model_card(name, 0)


def test_backbone_has_a_norm_per_map_instead_of_the_head():
    arguments = {"depths": (1, 2), "dims": (16, 32), "forward_type": "v05_noz", "ssm_d_state": 1, "num_classes": 7}
    dense, whole = (model_card(kind(**arguments), (3, 32, 64)) for kind in (dense_of_two_maps, VSSM))
    first, last = 8 * 16 * 16, 4 * 8 * 32  # numbers of the maps
    assert dense.macs - 5 * (first + last) == whole.macs - 5 * last - last - 32 * 7
    assert dense.parameters - 2 * (16 + 32) == whole.parameters - 2 * 32 - 33 * 7
    assert dense.name == "DenseVSSM"


def dense_of_two_maps(**arguments) -> DenseVSSM:
    return DenseVSSM(out_indices=(0, 1), **arguments)


def test_text_says_the_convention():
    text = str(card("vmamba_tiny_s1l8"))
    assert "vmamba_tiny_s1l8, one image of 3x224x224" in text and "30,249,064" in text and "fvcore" in text
    assert text.count("4,905,609,984") == 3  # hardware-aware, official, published
    assert str(card("vim_nano", (3, 32, 32))).count(" -\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("vmamba_tiny",), "model 'vmamba_tiny' is not one of vanilla_vmamba_base, "),
        ((torch.nn.Linear(2, 2),), "model is a Linear, which is not one of VSSM, VSSD, VisionMamba"),
        (("vmamba_nano", (3, 0, 32)), r"input_size=\(3, 0, 32\) is not \(channels, height, width\)"),
        (("vmamba_nano", (224, 224)), r"input_size=\(224, 224\) is not"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_card(*arguments)
