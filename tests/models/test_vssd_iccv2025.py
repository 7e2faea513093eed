"""The second generation of VSSD: its block against plain loops, its published arguments, names and files."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor

from ssm_models import from_upstream, load_checkpoint
from ssm_models.checkpoint import CheckpointError
from ssm_models.layers.linear_nc_ssd import LinearNCSSD
from ssm_models.layers.map_rope import rotate, rotations
from ssm_models.vssd import VSSD, VSSDBlock
from tests.models.golden import fill_model

STATES = (4, 8, 12, 16)
SMALL = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4), "d_state": STATES, "num_classes": 5}
NAME = "vssd_tiny_iccv2025"


def small(**kwargs) -> VSSD:
    return timm.create_model(NAME, **(SMALL | kwargs)).eval()


# ---- the block, token by token ----


def angle(k: int, n_state: int, row: int, column: int) -> float:
    """Of pair k of N/2."""
    quarter = n_state // 4
    place, k = (row, k) if k < quarter else (column, k - quarter)
    return place * 10000.0 ** (-k / quarter)


def turned(x: Tensor, row: int, column: int) -> Tensor:
    """(N,), the pairs as complex numbers."""
    pairs = torch.view_as_complex(x.view(-1, 2))
    angles = torch.tensor([angle(k, len(x), row, column) for k in range(len(pairs))], dtype=x.dtype)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()


def loop_mixer(mixer: LinearNCSSD, u: Tensor, heads: int, exp_da: bool = True, rope: bool = True) -> Tensor:
    """(1, H, W, C) -> the same, head by head and token by token as the formulas are published: with L and E in them."""
    _, height, width, C = u.shape
    p = {name: value.detach() for name, value in mixer.state_dict().items()}
    E = p["out_proj.weight"].shape[1]
    N, P, L = (p["conv2d.weight"].shape[0] - E) // 2, E // heads, height * width
    z, xBC, dt = (u @ p["in_proj.weight"].T).split([E, E + 2 * N, heads], 3)
    xBC = F.conv2d(xBC.permute(0, 3, 1, 2), p["conv2d.weight"], p["conv2d.bias"], padding=1, groups=E + 2 * N)
    x, B, C_ = F.silu(xBC)[0].flatten(1).T.split([E, N, N], 1)
    dt = dt.view(L, heads)
    y = torch.zeros(L, E, dtype=u.dtype)
    for h in range(heads):
        dA = [math.log1p(math.exp(float(dt[t, h] + p["dt_bias"][h]))) * math.exp(p["A_log"][h]) for t in range(L)]
        a = [L * math.exp(d) / sum(map(math.exp, dA)) for d in dA] if exp_da else [d / max(dA) for d in dA]
        scale = 1 / E
        places = [divmod(t, width) if rope else (0, 0) for t in range(L)]
        elu1 = [(row + 1).where(row > 0, row.exp()) for row in B]
        K, q = [a[t] * elu1[t] for t in range(L)], [(row + 1).where(row > 0, row.exp()) * scale for row in C_]
        V = [x[t, h * P : (h + 1) * P] for t in range(L)]
        S = sum(torch.outer(turned(K[t], *places[t]), V[t]) for t in range(L)) / L
        mean = sum(K) / L
        for t in range(L):
            y[t, h * P : (h + 1) * P] = turned(q[t], *places[t]) @ S / (q[t] @ mean + 1e-6) + p["D"][h] * V[t]
    y = F.layer_norm(y, (E,), p["norm.weight"], p["norm.bias"]) * z.view(L, E)
    return (y @ p["out_proj.weight"].T).view(u.shape)


def loop_block(block: VSSDBlock, x: Tensor, heads: int) -> Tensor:
    p, C = dict(block.named_parameters()), x.shape[3]

    def depthwise(name: str, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), p[f"{name}.weight"], p[f"{name}.bias"], padding=1, groups=C)
        return y.permute(0, 2, 3, 1)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), p[f"{name}.weight"], p[f"{name}.bias"])

    x = x + depthwise("cpe1", x)
    x = x + loop_mixer(block.attn, norm("norm1", x), heads)
    x = x + depthwise("cpe2", x)
    hidden = F.gelu(norm("norm2", x) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
    assert hidden.shape[3] == 3 * C
    return x + hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]


@pytest.mark.parametrize("size", [(3, 4), (6, 5)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_block_is_the_loop_over_its_tokens(stage, size):
    model = fill_model(small()).double()
    block, heads = model.layers[stage].blocks[-1], SMALL["num_heads"][stage]
    x = torch.randn(1, *size, model.dims[stage]).double()
    with torch.no_grad():
        torch.testing.assert_close(block(x), loop_block(block, x, heads), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exp_da", [True, False])
@pytest.mark.parametrize("rope", [True, False])
def test_switches(exp_da, rope):
    mixer = fill_model(LinearNCSSD(8, d_state=8, headdim=4, expand=1, exp_da=exp_da, rope=rope)).double()
    x = torch.randn(1, 3, 5, 8).double()
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), loop_mixer(mixer, x, 2, exp_da, rope), rtol=1e-10, atol=1e-12)
        for other in ({"exp_da": not exp_da, "rope": rope}, {"exp_da": exp_da, "rope": not rope}):
            assert not torch.allclose(mixer(x), loop_mixer(mixer, x, 2, **other), rtol=1e-3)


def test_groups_take_turns_over_the_heads():
    """Two groups are two mixers of one, each with every second head."""
    mixer = LinearNCSSD(16, d_state=4, headdim=4, expand=1, ngroups=2).double()
    single = LinearNCSSD(8, d_state=4, headdim=4, expand=1).double()
    x, dt = torch.randn(1, 12, 4, 4).double(), torch.randn(1, 12, 4).double()
    B, C = torch.randn(2, 1, 12, 2, 4).double()
    y = mixer._mix(x, dt, B, C, (3, 4))
    single.eps = mixer.eps  # it is of all inner channels
    for g in range(2):
        for name in ("A_log", "dt_bias", "D"):
            getattr(single, name).data = getattr(mixer, name).data[g::2]
        group = slice(g, g + 1)
        torch.testing.assert_close(
            y[:, :, g::2], single._mix(x[:, :, g::2], dt[..., g::2], B[:, :, group], C[:, :, group], (3, 4))
        )


def test_without_rotation_a_token_is_a_mean_of_tokens():
    """The weights of a row are positive and have the sum 1, up to the constant: a constant comes out as it went in."""
    mixer = LinearNCSSD(8, d_state=4, headdim=4, expand=1, rope=False).double()
    torch.nn.init.zeros_(mixer.D)
    dt, (B, C) = 5 * torch.randn(1, 30, 2).double(), 3 * torch.randn(2, 1, 30, 1, 4).double()
    x = torch.full((1, 30, 2, 4), 7.0).double()
    y = mixer._mix(x, dt, B, C, (5, 6))
    assert ((7 - y) > 0).all() and ((7 - y) < 7e-3).all()
    mixer.eps = 0.0
    torch.testing.assert_close(mixer._mix(x, dt, B, C, (5, 6)), x)
    one = F.one_hot(torch.tensor(11), 30).double().view(1, 30, 1, 1).expand_as(x)
    row = mixer._mix(one, dt, B, C, (5, 6))
    assert (row > 0).all() and (row < 1).all()


# ---- positions ----


def test_products_of_rotated_tokens_depend_on_the_distance_alone():
    height, width, n = 5, 6, 12
    q, k = torch.randn(2, n).double()
    tables = rotations(height, width, n, like=q)
    q_, k_ = (rotate(t.expand(1, height, width, 1, n), *tables)[0, :, :, 0] for t in (q, k))
    products = torch.einsum("abn,cdn->abcd", q_, k_)
    by_distance = {}
    for a, b, c, d in torch.cartesian_prod(*map(torch.arange, products.shape)).tolist():
        by_distance.setdefault((a - c, b - d), []).append(products[a, b, c, d])
    assert len(by_distance) == (2 * height - 1) * (2 * width - 1)
    for found in by_distance.values():
        torch.testing.assert_close(torch.stack(found), found[0].expand(len(found)), rtol=1e-12, atol=1e-12)
    assert torch.stack([found[0] for found in by_distance.values()]).std() > 0.1


def test_rotations_are_those_of_whole_positions_at_every_size():
    large = torch.stack(rotations(56, 56, 24, like=torch.empty(0)), 3)
    assert large.shape == (56, 56, 12, 2) and large.dtype == torch.float32
    assert torch.equal(torch.stack(rotations(7, 30, 24, like=torch.empty(0).bfloat16()), 3), large[:7, :30])
    for row, column, k in [(0, 0, 0), (3, 50, 2), (55, 1, 5), (40, 9, 6), (2, 55, 11)]:
        a = angle(k, 24, row, column)
        assert large[row, column, k].tolist() == pytest.approx([math.cos(a), math.sin(a)], abs=1e-5)
    x = torch.randn(1, 56, 56, 1, 24)
    torch.testing.assert_close(rotate(x, *large.unbind(3))[0, 9, 40, 0], turned(x[0, 9, 40, 0], 9, 40))


# ---- the models ----


@pytest.mark.parametrize("name, depths, rate", [(NAME, [2, 2, 8, 2], 0.2), ("vssd_small_iccv2025", [2, 4, 15, 4], 0.4)])
def test_published_shapes(name, depths, rate):
    model = timm.create_model(name, device="meta")
    assert [len(stage.blocks) for stage in model.layers] == depths and model.dims == [96, 192, 384, 768]
    for stage, dim, n_state, heads in zip(model.layers, model.dims, (12, 24, 48), (4, 4, 8), strict=False):
        for block in stage.blocks:
            assert isinstance(block.attn, LinearNCSSD) and block.attn.exp_da and block.attn.rope
            assert block.attn.in_proj.weight.shape == (2 * dim + 2 * n_state + heads, dim)
    assert model.layers[3].blocks[0].attn.num_heads == 16
    assert model.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(rate)
    assert model.pretrained_cfg["first_conv"] == "patch_embed.proj.0"


def test_any_size_and_maps():
    model = small()
    for size in ((33, 47), (61, 35), (5, 4)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    maps = model.forward_intermediates(torch.randn(1, 3, 50, 70), intermediates_only=True)
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 13, 18), (32, 7, 9), (64, 4, 5), (128, 2, 3)]


def settle(model: VSSD) -> VSSD:
    """Running statistics of a few random images, so that BatchNorm does something in eval mode."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def test_deployment_folds_every_batch_norm():
    model = settle(small())
    deployed = reparameterize_model(reparameterize_model(model))
    kinds = [[type(m) for m in of.modules()].count(torch.nn.BatchNorm2d) for of in (model, deployed)]
    assert kinds == [4 + 3, 0]
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_near_float32(dtype):
    model = settle(small(drop_path_rate=0.0))
    x = torch.randn(2, 3, 64, 64)
    exact = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.float().square().mean().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    assert (y.float() - exact).norm() <= tolerance * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (model.to(dtype)(x.to(dtype)).float() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"d_state": (4, 8)}, r"d_state=\(4, 8\) must be one number, or one per stage of depths"),
        ({"d_state": 6}, "d_state=6 must be a multiple of 4 for rotary"),
        ({"linear_attn_duality": False}, "ssd_linear_norm=True is not for causal, bidirectional or negative"),
        ({"ssd_positive_dA": False}, "ssd_linear_norm=True is not for causal, bidirectional or negative"),
        ({"ssd_linear_norm": False}, "exp_da=True and rope=True are parts of ssd_linear_norm=True, which is off"),
        ({"simple_downsample": True}, "simple_downsample=True and rmt_downsample=True exclude each other"),
    ],
)
def test_illegal_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


# ---- upstream's descriptions ----

# of its keyword arguments, as its configs spell them
PUBLISHED = {
    **{"embed_dim": 96, "depths": [2, 2, 8, 2], "num_heads": [4, 4, 8, 16], "mlp_ratio": 3, "ssd_expansion": 1},
    **{"async_state": [12, 24, 48, 64], "d_state": 64, "drop_path_rate": 0.2, "ssd_chunk_size": 256, "ssd_ngroups": 1},
    **dict.fromkeys(("rmt_downsample", "rmt_patch_embed", "use_cpe", "ssd_linear_norm", "exp_da", "rope"), True),
    **{"ssd_positve_dA": True, "multi_branch": True, "zact": False, "ssd_aexp": False, "ssd_norm_da": False},
    **{"ab_bias": False, "dscale": False, "res_scale": False, "linear_attn_duality": True},
}


def shapes(model: VSSD) -> dict:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        {"d_state": 64, **dict(reversed(PUBLISHED.items()))},
        {"MODEL": {"TYPE": "vmamba2", "VMAMBA2": {name.upper(): value for name, value in PUBLISHED.items()}}},
        "vssd_tiny_iccv2025",
        "vssd_iccv_version/vssd_tiny_iccv2025_mesa_e300.yaml",
        "vssd_tiny_mesa.pth",
    ],
    ids=["arguments", "d_state first", "yaml", "name", "yaml's name", "file's name"],
)
def test_from_upstream(config):
    with torch.device("meta"):
        model = from_upstream("vssd", config)
        assert shapes(model) == shapes(timm.create_model(NAME))
    mixer = model.layers[0].blocks[0].attn
    assert isinstance(mixer, LinearNCSSD) and mixer.exp_da and mixer.rope
    assert model.layers[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    "name, variant",
    [
        ("vssd_small_iccv2025.yaml", "vssd_small_iccv2025"),
        ("vssd_small_mesa.pth", "vssd_small_iccv2025"),
        ("vssd_base_iccv2025_e300", "vssd_base"),
    ],
)
def test_other_published_names(name, variant):
    with torch.device("meta"):
        assert shapes(from_upstream("vssd", name)) == shapes(timm.create_model(variant))


def test_the_key_that_the_first_generation_s_configs_gained():
    with torch.device("meta"):
        model = from_upstream("vssd", {"type": "MM_VSSD", "embed_dim": 96, "use_cpe": True}, backbone=True)
    assert model.dims == [96, 192, 384, 768]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"use_cpe": False}, "use_cpe=False: VSSD has True there and nothing else"),
        ({"zact": True}, "zact=True: VSSD has False there and nothing else"),
        ({"ssd_aexp": True}, "ssd_aexp=True: VSSD has False there and nothing else"),
        ({"async_state": True}, "async_state=True is not a list of one d_state per stage"),
        ({"rmt_stem": True}, "rmt_stem: True is not an argument of upstream's VMAMBA2"),
        ("vssd_micro_iccv2025", "'vssd_micro_iccv2025' is not a published VSSD"),
    ],
)
def test_descriptions_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        from_upstream("vssd", config)


# ---- upstream's files ----


def published_shapes(down: str = "reduction", down_norm: str = "norm") -> dict[str, tuple[int, ...]]:
    """The names of a published file, of the size of `small`, without its rotations."""
    dims, found = [16, 32, 64, 128], {}

    def weight(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def batch_norm(name: str, dim: int) -> None:
        weight(name, dim)
        found.update({f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,), f"{name}.num_batches_tracked": ()})

    for i, (before, after) in enumerate([(3, 8), (8, 8), (8, 16), (16, 16)]):
        weight(f"patch_embed.proj.{3 * i}", after, before, 3, 3)
        batch_norm(f"patch_embed.proj.{3 * i + 1}", after)
    for s, (dim, heads, n_state) in enumerate(zip(dims, SMALL["num_heads"], STATES, strict=True)):
        for b in range(SMALL["depths"][s]):
            block = f"layers.{s}.blocks.{b}"
            for part in ("cpe1", "cpe2"):
                weight(f"{block}.{part}", dim, 1, 3, 3)
            for part in ("norm1", "norm2"):
                weight(f"{block}.{part}", dim)
            weight(f"{block}.mlp.fc1", 3 * dim, dim)
            weight(f"{block}.mlp.fc2", dim, 3 * dim)
            if s == 3:
                weight(f"{block}.attn.to_qkv", 3 * dim, dim, bias=False)
                weight(f"{block}.attn.to_out", dim, dim)
                continue
            found |= {f"{block}.attn.{leaf}": (heads,) for leaf in ("A_log", "D", "dt_bias")}
            weight(f"{block}.attn.in_proj", 2 * dim + 2 * n_state + heads, dim, bias=False)
            weight(f"{block}.attn.conv2d", dim + 2 * n_state, 1, 3, 3)
            weight(f"{block}.attn.norm", dim)
            weight(f"{block}.attn.out_proj", dim, dim, bias=False)
        if s < 3:
            weight(f"layers.{s}.downsample.{down}", 2 * dim, dim, 3, 3)
            batch_norm(f"layers.{s}.downsample.{down_norm}", 2 * dim)
    weight("norm", 128)
    weight("head", 5, 128)
    return found


def published_rotations(name: str = "ropes") -> dict[str, Tensor]:
    """Of images of 64 pixels."""
    found = {}
    for s, depth in enumerate(SMALL["depths"][:3]):
        side, pairs = 16 // 2**s, STATES[s] // 2
        table = torch.empty(side, side, pairs, 2)
        for row, column, k in torch.cartesian_prod(*map(torch.arange, table.shape[:3])).tolist():
            a = angle(k, STATES[s], row, column)
            table[row, column, k] = torch.tensor([math.cos(a), math.sin(a)])
        found |= {f"layers.{s}.blocks.{b}.attn.{name}.rotations": table for b in range(depth)}
    return found


def published_weights(*spelling: str) -> dict[str, Tensor]:
    return {
        name: torch.randint(9, shape) if name.endswith("tracked") else torch.rand(shape)
        for name, shape in published_shapes(*spelling).items()
    }


SPELLINGS = [("reduction", "norm"), ("conv.0.conv", "norm"), ("conv.0.conv", "conv.0.norm")]


@pytest.mark.parametrize("rotated", ["", "ropes", "rope"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=" ".join)
def test_published_files_load_in_every_spelling_that_they_may_have(spelling, rotated, tmp_path):
    weights = published_weights(*spelling)
    file, tables = tmp_path / "vssd_tiny_mesa.pth", published_rotations(rotated) if rotated else {}
    torch.save({"model_ema": weights | tables, "epoch": 299}, file)
    direct, checked = small(), small()
    direct.load_state_dict(weights | tables, strict=True)
    report = load_checkpoint(checked, file, "ema")
    assert set(report.left_out) == set(tables) and report.fresh == ()
    assert set(report.renamed) == {name for name in weights if ".downsample.conv.0." in name}
    assert ("have other names here" in str(report)) == (spelling != SPELLINGS[0])
    for model in (direct, checked):
        state = model.state_dict()
        assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes()
        for (name, got), want in zip(state.items(), (weights[n] for n in _in_spelling(state, spelling)), strict=True):
            assert torch.equal(got, want), name


def test_pretrained(tmp_path):
    """timm's way, for other classes and gray images; strict but for them."""
    weights = published_weights("conv.0.conv", "norm") | published_rotations()
    torch.save({"model": weights}, tmp_path / "vssd_tiny_mesa.pth")
    overlay = {"file": str(tmp_path / "vssd_tiny_mesa.pth"), "num_classes": 5}
    more = SMALL | {"num_classes": 7, "in_chans": 1}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **more)
    state = model.state_dict()
    assert state["head.weight"].shape == (7, 128)
    torch.testing.assert_close(state["patch_embed.proj.0.weight"], weights["patch_embed.proj.0.weight"].sum(1, True))
    for ours, theirs in (
        ("layers.0.downsample.reduction.bias", "layers.0.downsample.conv.0.conv.bias"),
        ("norm.bias",) * 2,
    ):
        assert torch.equal(state[ours], weights[theirs])
    del weights["layers.1.blocks.0.attn.D"]
    torch.save({"model": weights}, tmp_path / "vssd_tiny_mesa.pth")
    with pytest.raises(CheckpointError, match="does not fit this VSSD: missing layers.1.blocks.0.attn.D"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **more)


def _in_spelling(names, spelling: tuple[str, str]) -> list[str]:
    down = {"reduction": spelling[0], "norm": spelling[1]}

    def spelled(name: str) -> str:
        head, found, rest = name.partition(".downsample.")
        part, _, leaf = rest.partition(".")
        return f"{head}{found}{down[part]}.{leaf}" if found else name

    return [spelled(name) for name in names]


def test_a_classifier_s_file_in_a_backbone(tmp_path):
    torch.save({"model": published_weights() | published_rotations()}, tmp_path / "vssd.pth")
    arguments = {name: value for name, value in SMALL.items() if name != "num_classes"}
    config = {**PUBLISHED, **arguments, "async_state": STATES}
    model = from_upstream("vssd", config | {"out_indices": (0, 1, 2)}, backbone=True)
    report = load_checkpoint(model, tmp_path / "vssd.pth")
    assert all(name.startswith("outnorm") for name in report.fresh) and len(report.fresh) == 6
    assert set(published_rotations()) < set(report.left_out)
    # and back: what the model computes is in its own files no more
    torch.save(model.state_dict(), tmp_path / "backbone.pth")
    again = load_checkpoint(
        from_upstream("vssd", config | {"out_indices": (0, 1, 2)}, backbone=True), tmp_path / "backbone.pth"
    )
    assert again.fresh == again.left_out == again.renamed == ()


BAD = {
    "missing layers.0.downsample.reduction.bias": lambda w: w.pop("layers.0.downsample.reduction.bias"),
    "unexpected layers.3.blocks.0.attn.ropes.rotations": lambda w: w.update(
        {"layers.3.blocks.0.attn.ropes.rotations": torch.zeros(2, 2, 8, 2)}
    ),
    r"rotations is \(4, 4, 7, 2\) in torch.float32, not \(H, W, 6, 2\)": lambda w: w.update(
        {"layers.2.blocks.1.attn.ropes.rotations": torch.zeros(4, 4, 7, 2)}
    ),
    r"layers.1.blocks.0.attn.ropes.rotations differs by .* from the rotations of this model": lambda w: w[
        "layers.1.blocks.0.attn.ropes.rotations"
    ].transpose_(0, 1),
    r"rotations differs by nan": lambda w: w["layers.1.blocks.0.attn.ropes.rotations"].fill_(math.nan),
    "layers.0.downsample.reduction.weight is there twice": lambda w: w.update(
        {"layers.0.downsample.conv.0.conv.weight": torch.zeros(32, 16, 3, 3)}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_do_not_load(message, tmp_path):
    weights = {name: value.clone() for name, value in (published_weights() | published_rotations()).items()}
    BAD[message](weights)
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path / "weights.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotations_in_half_precision_are_the_same_rotations(dtype):
    tables = {name: value.to(dtype) for name, value in published_rotations().items()}
    small().load_state_dict(published_weights() | tables, strict=True)


def test_a_model_without_rotations_takes_none():
    with pytest.raises(RuntimeError, match="Unexpected key.*rotations"):
        small(rope=False).load_state_dict(published_weights() | published_rotations(), strict=True)
