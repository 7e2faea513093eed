"""What Vim does with class tokens, pooling, positions and training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssm_models.layers.pos_embed import class_token_rows, insert_rows, resize_pos_embed, split_rows
from ssm_models.layers.rope import GridRope
from ssm_models.vim import VisionMamba
from tests.models.small_vim import SMALL, small

# ---- class tokens ----

PLACES = {"middle": [8], "head": [0], "tail": [16], "double": [0, 17], "random": [8]}


def show_class_tokens(model) -> VisionMamba:
    """Tokens are 0 for patches and 1 for class tokens."""
    with torch.no_grad():
        for parameter in model.patch_embed.parameters():
            parameter.zero_()
        for token in model.class_tokens():
            token.fill_(1.0)
    return model


@pytest.mark.parametrize("mode", PLACES)
def test_where_class_tokens_are(mode):
    model = show_class_tokens(small(cls_mode=mode, if_abs_pos_embed=False))
    x, order, grid = model.forward_stem(torch.randn(1, 3, 64, 64))
    assert x[0, :, 0].nonzero().flatten().tolist() == PLACES[mode] and order is None and grid == (4, 4)
    tokens = torch.randn(2, x.shape[1], 32)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, PLACES[mode]].mean(1))
    wide = model.forward_stem(torch.randn(1, 3, 48, 80))[0]
    assert wide[0, :, 0].nonzero().flatten().tolist() == {"middle": [7], "random": [7], "double": [0, 16]}.get(
        mode, [0] if mode == "head" else [15]
    )


@pytest.mark.parametrize(
    "flags, mode",
    [
        ({}, "middle"),
        ({"use_middle_cls_token": False}, "head"),
        ({"use_double_cls_token": True}, "double"),
        ({"use_double_cls_token": True, "use_middle_cls_token": False}, "double"),
        ({"if_cls_token": False}, "none"),
        ({"if_cls_token": False, "use_double_cls_token": True}, "none"),
    ],
)
def test_published_flags_say_where(flags, mode):
    model = VisionMamba(**SMALL, **flags)
    assert model.cls_mode == mode
    assert model.pos_embed.shape[1] == 16 + len(class_token_rows(mode, 16))


def test_random_class_token_is_anywhere_in_training():
    model = show_class_tokens(small(cls_mode="random", if_abs_pos_embed=False)).train()
    places = set()
    for _ in range(150):
        x, order, _ = model.forward_stem(torch.randn(1, 3, 64, 64))
        places.add(int(x[0, :, 0].nonzero()))
        assert sorted(order.tolist()) == list(range(17)) and int(order[int(x[0, :, 0].nonzero())]) == 8
    assert places == set(range(17))


def test_random_class_token_keeps_patches_and_position_embedding_in_order():
    model = small(cls_mode="random").train()
    with torch.no_grad():
        model.pos_embed.zero_()
        x = torch.randn(1, 3, 64, 64)
        rest = model.eval().forward_stem(x)[0]
        moved, order, _ = model.train().forward_stem(x)
        torch.testing.assert_close(moved, rest[:, order])
        patches = order[order != 8]
        assert patches.tolist() == sorted(patches.tolist())
        rows = model.pos_embed.copy_(torch.arange(17.0)[None, :, None].expand(1, 17, 32))
        show_class_tokens(model).cls_token.zero_()
        torch.testing.assert_close(model.forward_stem(x)[0], rows)  # a row belongs to a place


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kwargs", [{"cls_mode": "random"}, {"flip_img_sequences_ratio": 0.5, "cls_mode": "tail"}])
def test_what_is_given_out_is_in_resting_order(kwargs, rotary):
    """Without mixers a token keeps its value, turned by its place in the grid, through the blocks, wherever it is."""
    model = small(**kwargs, if_abs_pos_embed=False, if_rope=rotary, if_rope_residual=rotary)
    with torch.no_grad():
        for block in model.layers:
            block.mixer.out_proj.weight.zero_()
    x = torch.randn(2, 3, 64, 64)
    want, maps = model.eval().forward_intermediates(x, return_prefix_tokens=True)
    for _ in range(6):
        got, moved = model.train().forward_intermediates(x, return_prefix_tokens=True)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(moved, maps)
        torch.testing.assert_close(model(x), model.eval()(x))


def test_flip_in_training_only_and_from_ratio_1_always():
    x = torch.randn(2, 3, 64, 64)
    straight, flipped = small()(x), small(flip_img_sequences_ratio=1.0)(x)
    assert (straight - flipped).abs().max() > 1e-3
    model = small(flip_img_sequences_ratio=0.5)
    assert torch.equal(model(x), straight) and torch.equal(model(x), straight)
    seen = [int(torch.allclose(model.train()(x), flipped, atol=1e-6)) for _ in range(20)]
    assert 0 < sum(seen) < 20
    torch.testing.assert_close(small(flip_img_sequences_ratio=-1.0).train()(x), straight)


# ---- pooling ----


def test_pool_types():
    x = torch.randn(2, 3, 64, 64)
    model = small(if_cls_token=False)
    tokens = model.forward_features(x)
    logits = model.head(tokens)
    wanted = {"none": logits[:, -1], "mean": model.head(tokens.mean(1)), "max": logits.amax(1), "all": logits}
    for pool_type, want in wanted.items():
        torch.testing.assert_close(small(if_cls_token=False, final_pool_type=pool_type)(x), want)
    torch.testing.assert_close(small(if_cls_token=False, global_pool="avg")(x), wanted["mean"])


def test_pooling_beside_a_class_token_is_of_patches():
    x = torch.randn(2, 3, 64, 64)
    model = small(final_pool_type="mean")
    tokens = model.forward_features(x)
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    torch.testing.assert_close(model(x), model.head(tokens[:, 8]))  # the class token comes first
    wanted = {"avg": model.head(patches.mean(1)), "none": model.head(tokens[:, -1]), "": model.head(tokens)}
    for pool, want in {**wanted, "max": model.head(patches).amax(1), "token": model(x)}.items():
        torch.testing.assert_close(small(global_pool=pool)(x), want)


# ---- positions ----


def test_position_embedding_resized_as_published():
    stored = np.load(Path(__file__).parent.parent / "data/vim/pos_embed.npz")
    with torch.device("meta"):
        model = VisionMamba(embed_dim=6, depth=1, stride=8)
    entries = {"cls_token": torch.zeros(1, 1, 6), "pos_embed": torch.from_numpy(stored["pos_embed_197"])}
    got = model.convert_state_dict(entries, legacy_pos_embed=True)["pos_embed"]
    np.testing.assert_allclose(got, stored["pos_embed_730"], rtol=1e-5, atol=1e-6)
    right = model.convert_state_dict(entries)["pos_embed"]
    assert (right - got).norm() > 0.5 * got.norm()
    grid = entries["pos_embed"][:, [i for i in range(197) if i != 98]].mT.unflatten(2, (14, 14))
    grid = F.interpolate(grid, (27, 27), mode="bicubic").flatten(2).mT
    assert torch.equal(right, torch.cat([grid[:, :364], entries["pos_embed"][:, 98:99], grid[:, 364:]], 1))


@pytest.mark.parametrize("mode", ["none", "head", "middle", "tail", "double"])
def test_resizing_turns_with_the_image_and_keeps_class_tokens(mode):
    old, new = (4, 6), (7, 5)
    old_rows, new_rows = class_token_rows(mode, 24), class_token_rows(mode, 35)
    pos_embed = torch.randn(1, 24 + len(old_rows), 3)

    def turned(x, grid, rows):
        patches, tokens = split_rows(x, rows)
        return insert_rows(patches.unflatten(1, grid).flip(1, 2).flatten(1, 2), tokens, rows)

    there = resize_pos_embed(pos_embed, old, new, old_rows, new_rows)
    torch.testing.assert_close(
        resize_pos_embed(turned(pos_embed, old, old_rows), old, new, old_rows, new_rows), turned(there, new, new_rows)
    )
    assert torch.equal(there[:, list(new_rows)], pos_embed[:, list(old_rows)])
    assert torch.equal(resize_pos_embed(pos_embed, old, old, old_rows, old_rows), pos_embed)
    flat = resize_pos_embed(torch.full_like(pos_embed, 0.7), old, new, old_rows, new_rows)
    torch.testing.assert_close(flat, torch.full_like(there, 0.7))
    dropped = resize_pos_embed(pos_embed, old, old, old_rows, ())
    assert torch.equal(dropped, split_rows(pos_embed, old_rows)[0])


def test_resizing_keeps_the_dtype_and_names_what_does_not_fit():
    half = resize_pos_embed(torch.randn(1, 17, 3).bfloat16(), (4, 4), (2, 2), (8,), (2,))
    assert half.dtype == torch.bfloat16 and half.shape == (1, 5, 3)
    with pytest.raises(ValueError, match="pos_embed of 18 rows is not one of a 4x4 grid with 1 class tokens"):
        resize_pos_embed(torch.randn(1, 18, 3), (4, 4), (2, 2), (8,), (2,))


def test_rotary_positions_are_rotations_by_row_and_column():
    h, w, dim, side = 3, 5, 8, 14
    rope = GridRope(dim, (h, w), side)
    x = torch.randn(2, h * w, dim)
    want = torch.empty(2, h * w, dim // 2, dtype=torch.complex64)
    for row in range(h):
        for column in range(w):
            for j in range(dim // 2):
                place = row / h if j < dim // 4 else column / w
                angle = place * side * 10000.0 ** (-2 * (j % (dim // 4)) / (dim / 2))
                pair = x[:, row * w + column, 2 * j : 2 * j + 2].contiguous()
                want[:, row * w + column, j] = torch.view_as_complex(pair) * complex(math.cos(angle), math.sin(angle))
    torch.testing.assert_close(rope(x, (h, w)), torch.view_as_real(want).flatten(2))
    other = GridRope(dim, (7, 7), side)
    torch.testing.assert_close(other(x, (h, w)), rope(x, (h, w)))  # a size that it was not made for


@pytest.mark.parametrize("mode", [*PLACES, "none"])
def test_rotary_positions_with_any_stride_size_and_class_token(mode):
    classes = {"if_cls_token": False} if mode == "none" else {"cls_mode": mode}
    kwargs = {**classes, "if_rope": True, "if_rope_residual": True}
    assert small(**kwargs, stride=8).rope.freqs_cos.shape == (49, 32)
    model = small(**kwargs, flip_img_sequences_ratio=0.5, if_abs_pos_embed=False)
    for size in ((64, 64), (48, 80), (48, 48)):
        assert model.train()(torch.randn(1, 3, *size)).isfinite().all()
    twin = small(**kwargs, img_size=(48, 80), if_abs_pos_embed=False).eval()
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(model.eval()(x), twin(x))
    rotated = model._rotate(torch.ones(1, 16 + len(model.class_tokens()), 32), None, (4, 4))
    moved = ((rotated - 1).abs().amax((0, 2)) > 1e-6).tolist()
    # the first patch has angle 0; "middle" and "random" leave out the first token instead of theirs, as published
    assert moved.count(False) == 1 + len(model.class_tokens()) and not moved[0]


# ---- training ----


def test_drop_path_as_published():
    model = VisionMamba(**(SMALL | {"depth": 5, "drop_path_rate": 0.4}))
    rates = [getattr(m, "drop_prob", 0.0) for n, m in model.named_modules() if n.endswith("drop_path")]
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4])  # the last one is of the last block's output
    assert VisionMamba(**(SMALL | {"depth": 1, "drop_path_rate": 0.4})).drop_path.drop_prob == 0.4


def test_drop_path_drops_what_the_block_before_made():
    model = small(drop_path_rate=1.0, depth=3).train()
    taps = []
    for block in model.layers:
        block.register_forward_hook(lambda _m, _i, out: taps.append(out))
    features = model.forward_features(torch.randn(16, 3, 64, 64))
    (h0, r0), (h1, r1), (_, r2) = taps
    torch.testing.assert_close(r1, r0 + h0)
    kept = (r2 - r1).abs().amax((1, 2)) > 0  # with probability 1/2, and then twice as strong
    assert 0 < kept.sum() < 16
    torch.testing.assert_close(r2, r1 + 2 * h1 * kept[:, None, None])
    torch.testing.assert_close(features, model.norm_f(r2))  # with probability 0


def test_initial_values():
    torch.manual_seed(0)
    model = VisionMamba(img_size=64, depth=4, embed_dim=192)
    mixer = model.layers[1].mixer
    for name in ("A_log", "A_b_log"):
        torch.testing.assert_close(mixer.get_parameter(name).exp(), torch.arange(1.0, 17.0).expand(384, 16))
    assert torch.equal(mixer.D, torch.ones(384)) and torch.equal(mixer.D_b, torch.ones(384))
    steps = F.softplus(mixer.dt_proj.bias)
    assert steps.min() > 0.00099 and steps.max() < 0.1001 and steps.log().std() > 1
    assert not mixer.dt_proj_b.bias.any()  # as published: no such steps for the way back
    assert 0.28 < mixer.dt_proj.weight.abs().max() <= 12**-0.5 and mixer.dt_proj_b.weight.abs().max() <= 12**-0.5
    uniform = lambda fan_in: (3 * fan_in) ** -0.5  # noqa: E731  (std of nn.Linear's own)
    assert mixer.in_proj.weight.std().item() == pytest.approx(uniform(192), rel=0.02)
    assert mixer.out_proj.weight.std().item() == pytest.approx(uniform(384) / 4**0.5, rel=0.02)
    for table in (model.pos_embed, model.cls_token, model.head.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.05)
    assert not model.patch_embed.proj.bias.any() and not model.head.bias.any()
