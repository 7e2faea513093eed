"""Vim against recorded numbers of the official implementation, from its descriptions, and its checkpoints."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from ssm_models import DenseVisionMamba, load_checkpoint
from ssm_models.layers.bimamba import BiMamba
from ssm_models.layers.norm import RMSNorm
from ssm_models.layers.pos_embed import class_token_rows, insert_rows, resize_pos_embed, split_rows
from ssm_models.layers.rope import GridRope
from ssm_models.upstream.vim import build
from ssm_models.vim import VARIANTS, VimBlock, VisionMamba
from ssm_ops import causal_conv1d
from ssm_ops._library import OPERATORS, available
from tests.models.golden import assert_matches, fill_model, image, probe

DATA = Path(__file__).parent.parent / "data" / "vim"
GOLDENS = sorted(path.stem for path in (DATA / "goldens").glob("*.json"))
MANIFESTS = sorted(path.stem for path in (DATA / "keys").glob("*.json"))
TINY = [name for name in GOLDENS if name.startswith("tiny")]
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_classes": 5, "drop_path_rate": 0.0}


def record_of(name: str) -> dict:
    return json.loads((DATA / "goldens" / f"{name}.json").read_text())


def manifest(name: str) -> dict:
    return json.loads((DATA / "keys" / f"{name}.json").read_text())


def small(**kwargs) -> VisionMamba:
    return fill_model(VisionMamba(**(SMALL | kwargs)))


def run(model, record, dtype, tolerance):
    """Forward and loss, and the comparison of outputs and recorded stages; returns input, loss."""
    model = fill_model(model).to(dtype)
    seen = {}
    for name in {stage.split("[")[0] for stage in record["stages"]}:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    x = image(record["input_shape"]).to(dtype).requires_grad_()
    y = model(x)
    rms = record["logits"]["l2"] / math.sqrt(math.prod(record["logits"]["shape"]))
    np.testing.assert_allclose(y[:, :16].detach(), record["logits"]["first16"], rtol=0, atol=4 * tolerance * rms)
    assert_matches(y, record["logits"], tolerance, "logits")
    for stage, want in record["stages"].items():
        name, _, index = stage.partition("[")  # "layers.3[0]": what the mixer adds, "[1]": the residual stream
        assert_matches(seen[name][int(index[0])] if index else seen[name], want, tolerance, stage)
    loss = y.square().mean()
    assert float(loss.detach()) == pytest.approx(record["loss"], rel=10 * tolerance)
    return x, loss


def check_gradients(model, record, x, loss, tolerance):
    loss.backward()
    parameters = dict(model.named_parameters())
    assert set(record["grad_l2"]) == set(parameters)
    for name, norm in record["grad_l2"].items():
        assert float(parameters[name].grad.double().norm()) == pytest.approx(norm, rel=tolerance), name
    for name, value in record["grad_probe"].items():
        assert abs(probe(parameters[name].grad) - value) <= tolerance * record["grad_l2"][name], name
    assert float(x.grad.double().norm()) == pytest.approx(record["grad_input_l2"], rel=tolerance)


@pytest.mark.parametrize("name", TINY)
def test_float64_and_its_gradients(name):
    record = record_of(name)
    model = build(record["config"])
    check_gradients(model, record, *run(model, record, torch.float64, 1e-11), 1e-10)


@torch.no_grad()
def test_float64_at_full_size():
    record = record_of("vim_tiny_patch16_224")
    run(build(record["config"]), record, torch.float64, 1e-11)


@pytest.mark.parametrize("name", GOLDENS)
def test_float32_and_its_gradients(name):
    record = record_of(name)
    model = build(record["config"])
    check_gradients(model, record, *run(model, record, torch.float32, max(5e-6, 5 * record["noise"])), 1e-3)


@pytest.mark.parametrize("name", MANIFESTS)
def test_keys_shapes_order_and_counts(name):
    stored = manifest(name)
    with torch.device("meta"):
        models = [build(stored["config"])]
        if name in VARIANTS:
            models.append(timm.create_model(name))
    for model in models:
        assert list(stored["keys"].items()) == [(key, list(v.shape)) for key, v in model.state_dict().items()]
        assert sum(p.numel() for p in model.parameters()) == stored["n_params"]


# ---- modules ----

MODULES = json.loads((DATA / "modules.json").read_text())
OUTPUTS = np.load(DATA / "modules.npz")


def drawn(description: str) -> torch.Tensor:
    """'PCG64(4321).standard_normal([2, 11, 8]) float32' -> that tensor, in float64"""
    seed, shape = description.removeprefix("PCG64(").split(").standard_normal(")
    shape = json.loads(shape.split(")")[0])
    noise = np.random.Generator(np.random.PCG64(int(seed))).standard_normal(shape)
    return torch.from_numpy(noise.astype("f4")).double()


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1d = torch.nn.Conv1d(6, 6, 4, groups=6)

    def forward(self, x):
        return causal_conv1d(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")


class AddAndNorm(torch.nn.Module):
    """A block without a mixer; hidden state and residual stream side by side."""

    def __init__(self, norm):
        super().__init__()
        block = VimBlock(12, torch.nn.Identity(), norm, drop_path=0.0, residual_in_fp32=True)
        self.norm, self.block = norm, [block]

    def forward(self, x):
        return torch.cat(self.block[0](*x.chunk(2, dim=1)), 1)


class Rotation(torch.nn.Module):
    """Tokens of a 4x4 grid, behind a class token if there is one more."""

    def __init__(self, pt_seq_len, head):
        super().__init__()
        self.rope, self.head = GridRope(16, (4, 4), pt_seq_len), head

    def forward(self, x):
        return torch.cat([x[:, : self.head], self.rope(x[:, self.head :], (4, 4))], 1)


def make_module(name: str, impl: str = "auto") -> torch.nn.Module:
    case = MODULES[name]
    if name.startswith("mamba"):
        return BiMamba(**case["kwargs"], impl=impl)
    if name.startswith("rope"):
        return Rotation(case["kwargs"]["pt_seq_len"], int("cls" in name))
    return {
        "causal_conv1d_silu": Convolution,
        "fused_add_rms": lambda: AddAndNorm(RMSNorm(12)),
        "fused_add_ln": lambda: AddAndNorm(torch.nn.LayerNorm(12)),
    }[name]()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module(name):
    case = MODULES[name]
    module = make_module(name)
    for table in ("freqs_cos", "freqs_sin"):
        if f"{name}/{table}" in OUTPUTS:
            np.testing.assert_array_equal(getattr(module.rope, table), OUTPUTS[f"{name}/{table}"])
    module = fill_model(module).double()
    assert {key.removeprefix("rope."): list(v.shape) for key, v in module.state_dict().items()} == case["keys"]
    x = drawn(case["x"]).requires_grad_()
    y = module(x)
    y.backward(drawn(case["dy"]))
    for got, part in ((y, "y"), (x.grad, "dx")):
        np.testing.assert_allclose(got.detach(), OUTPUTS[f"{name}/{part}"], rtol=1e-6, atol=1e-6)
    for key, norm in case["grad_l2"].items():
        assert float(module.get_parameter(key).grad.norm()) == pytest.approx(norm, rel=1e-9), key


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
def test_implementations_agree(bimamba_type):
    operator = OPERATORS["selective_scan"]
    x = torch.randn(2, 19, 16)
    kwargs = {"d_model": 16, "bimamba_type": bimamba_type}
    exact = fill_model(BiMamba(**kwargs, impl="reference")).double()(x.double())
    for impl in ["auto", *available(operator, "cpu", torch.float32)]:
        y = fill_model(BiMamba(**kwargs, impl=impl))(x)
        assert (y - exact).norm() <= 2e-6 * exact.norm(), impl


@pytest.mark.parametrize("impl", ["cpu", "cuda", "triton", "reference"])
def test_the_convolution_needs_no_kernel_of_the_name_of_the_scan(impl):
    x = torch.randn(1, 7, 16)
    exact = fill_model(BiMamba(8, impl="reference"))
    mixer = fill_model(BiMamba(8, impl=impl))
    torch.testing.assert_close(mixer._conv(x, mixer.conv1d), exact._conv(x, exact.conv1d))


@pytest.mark.parametrize("bimamba_type", ["none", "v1", "v2"])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_which_tokens_see_which(bimamba_type, d_conv):
    """One direction hides what comes later from a token; with two every token sees all others."""
    mixer = fill_model(BiMamba(16, d_conv=d_conv, bimamba_type=bimamba_type)).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    for changed in range(6):
        other = x.clone()
        other[:, changed] += 1
        differs = ((mixer(other) - mixer(x)).abs().amax((0, 2)) > 1e-9).tolist()
        assert differs == [bimamba_type != "none" or t >= changed for t in range(6)]


def test_the_way_back_is_the_way_forth_over_the_reversed_sequence():
    """With the same parameters for both, and no division, reversing tokens reverses the output."""
    mixer = fill_model(BiMamba(16, bimamba_type="v2"))
    for name, parameter in mixer.named_parameters():
        if "_b." in name or name in ("A_b_log", "D_b"):
            parameter.data.copy_(mixer.get_parameter(name.replace("A_b_log", "A_log").replace("_b", "")))
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("bimamba_type", ["v1", "v2"])
def test_the_way_back_is_never_left_out(bimamba_type, impl):
    model = small(bimamba_type=bimamba_type, scan_impl=impl)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    before.square().mean().backward()
    leaves = {"v1": ["A_b_log"], "v2": ["A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight"]}
    leaves["v2"] += ["dt_proj_b.weight", "dt_proj_b.bias"]
    for leaf in leaves[bimamba_type]:
        parameter = model.layers[0].mixer.get_parameter(leaf)
        assert parameter.grad.norm() > 1e-6, leaf
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(1.0)
            assert (model(x) - before).abs().max() > 1e-5, leaf
            parameter.copy_(kept)


def test_divide_out_halves_v2_alone():
    for bimamba_type, factor in (("none", 1), ("v1", 1), ("v2", 2)):
        x = torch.randn(1, 5, 16)
        halved, whole = (fill_model(BiMamba(16, bimamba_type=bimamba_type, if_divide_out=b))(x) for b in (True, False))
        torch.testing.assert_close(factor * halved, whole)


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
    stored = np.load(DATA / "pos_embed.npz")
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


# ---- checkpoints ----


def test_a_checkpoint_of_another_image_size_loads_and_acts_as_resizing_on_the_way():
    for mode in PLACES:
        model = small(cls_mode=mode)
        other = VisionMamba(**(SMALL | {"img_size": (48, 96)}), cls_mode=mode).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        assert other.pos_embed.shape[1] == 18 + len(other.class_tokens())
        x = torch.randn(1, 3, 48, 96)
        torch.testing.assert_close(other(x), model(x))


def test_checkpoint_of_a_stride_8_model_and_rotary_tables_of_another_size():
    model = small(if_rope=True)
    other = VisionMamba(**SMALL, if_rope=True, stride=8)
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.rope.freqs_cos.shape == (49, 32) and other.pos_embed.shape == (1, 50, 32)
    assert torch.equal(other.rope.freqs_cos, GridRope(32, (7, 7), 14).freqs_cos)
    assert torch.equal(other.pos_embed[:, 24], model.pos_embed[:, 8])
    as_part = torch.nn.ModuleDict({"backbone": VisionMamba(**SMALL, if_rope=True, stride=8)})
    as_part.load_state_dict({f"backbone.{n}": v for n, v in model.state_dict().items()}, strict=True)
    assert torch.equal(as_part["backbone"].pos_embed, other.pos_embed)


def dense(**kwargs) -> DenseVisionMamba:
    arguments = {n: v for n, v in SMALL.items() if n != "num_classes"} | {"out_indices": (0, 1), "if_fpn": False}
    return DenseVisionMamba(**(arguments | kwargs))


@pytest.mark.parametrize("mode", ["middle", "head", "double"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_backbone_drops_the_class_token_and_its_row(mode, legacy):
    flags = {"use_middle_cls_token": mode == "middle", "use_double_cls_token": mode == "double"}
    classifier, backbone = small(**flags), dense(**flags)
    converted = backbone.convert_state_dict(classifier.state_dict(), legacy_pos_embed=legacy)
    rows = tuple(range(len(classifier.class_tokens()))) if legacy else class_token_rows(mode, 16)
    assert torch.equal(converted["pos_embed"], split_rows(classifier.pos_embed, rows)[0])
    assert set(converted) - set(backbone.state_dict()) == {"head.weight", "head.bias", "norm_f.weight"}
    assert converted.keys() == backbone.convert_state_dict(converted).keys()  # twice is once
    assert torch.equal(backbone.convert_state_dict(converted)["pos_embed"], converted["pos_embed"])
    length, rows = classifier.pos_embed.shape[1], class_token_rows(mode, 16)
    for grid in ((6, 6), (1, length)):  # the second one with as many patches as the file has rows
        other = dense(**flags, img_size=(16 * grid[0], 16 * grid[1]))
        converted = other.convert_state_dict(classifier.state_dict())
        assert torch.equal(converted["pos_embed"], resize_pos_embed(classifier.pos_embed, (4, 4), grid, rows, ()))
        assert other.load_state_dict(converted, strict=False).missing_keys == []


def test_a_classifiers_file_into_a_backbone(tmp_path):
    classifier, backbone = small(), dense()
    torch.save({"model": classifier.state_dict()}, tmp_path / "vim.pth")
    load_checkpoint(backbone, tmp_path / "vim.pth")
    own = backbone.state_dict()
    same = {n for n, v in classifier.state_dict().items() if n in own and torch.equal(own[n], v)}
    assert same == set(own) - {"pos_embed"}
    assert torch.equal(own["pos_embed"], split_rows(classifier.pos_embed, (8,))[0])


def test_differences_that_no_conversion_bridges_are_named():
    with pytest.raises(RuntimeError, match=r'Missing key.*"cls_token"(?s:.*)size mismatch for pos_embed'):
        small().load_state_dict(small(if_cls_token=False).state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*"cls_token"'):
        small(if_cls_token=False).load_state_dict(small().state_dict())
    state = small().state_dict() | {"pos_embed": torch.zeros(1, 13, 32)}
    message = "pos_embed of 13 rows has 12 beside 1 class tokens: neither the 16 of a 4x4 grid nor those of a square"
    with pytest.raises(ValueError, match=message):
        small().load_state_dict(state)
    with pytest.raises(ValueError, match="pos_embed of 1 rows has 0 beside 1 class tokens"):
        small().load_state_dict(state | {"pos_embed": torch.zeros(1, 1, 32)})


# ---- upstream's descriptions ----


def shape_of(model) -> dict:
    return {name: tuple(v.shape) for name, v in model.state_dict().items()}


_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with"


@pytest.mark.parametrize(
    "name, variant",
    [
        (f"vim_tiny_patch16_224_{_SUFFIX}_midclstok_div2", "vim_tiny_patch16_224"),
        (f"vim_tiny_patch16_stride8_224_{_SUFFIX}_midclstok_div2", "vim_tiny_patch16_stride8_224"),
        (f"vim_small_patch16_224_{_SUFFIX}_midclstok_div2", "vim_small_patch16_224"),
        (f"vim_small_patch16_stride8_224_{_SUFFIX}_midclstok_div2", "vim_small_patch16_stride8_224"),
        (f"vim_base_patch16_224_{_SUFFIX}_middle_cls_token_div2", "vim_base_patch16_224"),
        ("hustvl/Vim-tiny-midclstok", "vim_tiny_patch16_224"),
        ("hustvl/Vim-small-midclstok", "vim_small_patch16_224"),
        ("Vim-base-midclstok", "vim_base_patch16_224"),
        ("weights/vim_t_midclstok_76p1acc.pth", "vim_tiny_patch16_224"),
        ("vim_tiny_patch16_stride8_224", "vim_tiny_patch16_stride8_224"),
    ],
)
def test_published_names(name, variant):
    with torch.device("meta"):
        assert shape_of(build(name)) == shape_of(timm.create_model(variant))
        assert isinstance(build(name, backbone=True), DenseVisionMamba)


def test_renames_and_drops_arguments():
    dead = {"fused_add_norm": True, "ft_seq_len": None, "initializer_cfg": None, "device": None, "dtype": None}
    dead |= {"if_devide_out": True, "drop_block_rate": None, "pretrained": False, "pretrained_cfg": None}
    model = build({**SMALL, **dead, "channels": 4})
    assert type(model) is VisionMamba and model.patch_embed.proj.in_channels == 4
    of_backbone = {"out_indices": [1, 3], "if_fpn": False, "use_residual_as_feature": True, "last_layer_process": "add"}
    backbone = build({"img_size": 64, "depth": 4, "embed_dim": 32, "if_cls_token": True, **of_backbone}, backbone=True)
    assert backbone.cls_mode == "none" and backbone.out_indices == (1, 3) and backbone.last_layer_process == "add"


@pytest.mark.parametrize(
    "config, message",
    [
        ("vim_huge", "'vim_huge' is not a published Vim; known: vim_tiny_patch16_224"),
        ("", "'' is not a published Vim"),
        ({"depht": 3}, "unexpected keyword argument 'depht'"),
        ({"out_indices": (0,)}, "unexpected keyword argument 'out_indices'"),
        ({"depth": 1, "ssm_cfg": {"d_stat": 8}}, "unexpected keyword argument 'd_stat'"),
        ({"bimamba_type": "v3"}, "bimamba_type='v3' is not one of none, v1, v2"),
    ],
)
def test_names_what_it_does_not_know(config, message):
    with pytest.raises(ValueError) as caught:
        build(config)
    assert message in str(caught.value)
