"""Attention maps: rows against the derivative of the scans themselves, their places on the map, and the command."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ssm_ops
from analyze import image_files
from analyze.attention import MODES, Scan, recorded, sources
from analyze.attnmap import main
from analyze.impl import attnmap
from ssm_models.layers.attention import Attention
from ssm_models.layers.bimamba import BiMamba
from ssm_models.layers.linear_nc_ssd import LinearNCSSD
from ssm_models.layers.nc_ssd import NCSSD
from ssm_models.layers.ss2d import SS2D
from ssm_models.layers.ss2d_m0 import SS2DM0
from ssm_models.layers.ss2d_xv import SS2DXv
from ssm_models.vim import VisionMamba
from ssm_models.vssm import VSSM
from ssm_ops import cross_merge, cross_scan

HEIGHT, WIDTH, QUERY = 3, 5, 7  # token 7 of 15: row 1, column 2
LENGTH = HEIGHT * WIDTH


def test_a_row_is_the_closed_form():
    """Every mode against VMamba's formulas with w_t and divisions by it, in float64 on numbers that allow it."""
    D, N, G, L, t = 6, 3, 2, 9, 6
    dt, A = torch.rand(D, L).double(), -torch.rand(D, N).double()
    B, C = torch.randn(2, G, N, L).double()
    w = (A[:, :, None] * dt.cumsum(1)[:, None]).exp()  # (D, N, L)
    B_, C_ = (x.repeat_interleave(D // G, 0) for x in (B, C))
    pairs = {
        "CB": (C_, B_),
        "CBdt": (C_, B_ * dt[:, None]),
        "CwBw": (C_ * w, B_ / w),
        "CwBdtw": (C_ * w, B_ * dt[:, None] / w),
        "ww": (w, 1 / w),
    }
    scan = Scan("rows", dt, A, B, C, torch.arange(L), t)
    for mode, (q, k) in pairs.items():
        expected = (q.mT @ k).tril().mean(0)[t]
        torch.testing.assert_close(scan.row(mode, L), expected, rtol=1e-12, atol=1e-12)
    shared = Scan("rows", dt, A[:, :1], B, C, torch.arange(L), t)
    spread = Scan("rows", dt, A[:, :1].expand(D, N), B, C, torch.arange(L), t)
    for mode in MODES:
        torch.testing.assert_close(shared.row(mode, L), spread.row(mode, L), rtol=1e-12, atol=1e-12)


def test_forgotten_tokens_do_not_divide_by_zero(monkeypatch):
    """w falls to exp(-4500) on the way; the last tokens' quotients are still exact, in blocks of channels too."""
    D, L = 8, 3000
    dt, A = torch.full((D, L), 1.5), -torch.ones(D, 1)
    scan = Scan("rows", dt, A, torch.ones(1, 1, L), torch.ones(1, 1, L), torch.arange(L), L - 1)
    expected = (-1.5 * torch.arange(L - 1, -1, -1)).exp()
    torch.testing.assert_close(scan.row("ww", L), expected, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(scan.row("CwBdtw", L), 1.5 * expected, rtol=1e-4, atol=1e-30)
    whole = Scan("rows", torch.rand(D, L), -torch.rand(D, 4), *torch.randn(2, 2, 4, L), torch.arange(L), L // 2)
    row = whole.row("CwBdtw", L)
    monkeypatch.setattr("analyze.attention._BLOCK", 3 * 4 * (L // 2 + 1))  # three channels at a time
    torch.testing.assert_close(whole.row("CwBdtw", L), row, rtol=1e-5, atol=1e-7)


# ---- W is the derivative of the operator ----


def one_hot() -> Tensor:
    return F.one_hot(torch.tensor(QUERY), LENGTH).double().view(1, 1, HEIGHT, WIDTH)


def derivative(operator: str, call: dict, name: str, seed: Tensor) -> Tensor:
    """Of the sum of seed * result by the argument `name`, the others fixed, without the skip connection."""
    x = call[name].detach().clone().requires_grad_()
    skip = "D"
    y = getattr(ssm_ops, operator)(**{**call, name: x, skip: torch.zeros_like(call[skip])})
    return torch.autograd.grad((y * seed).sum(), x)[0]


def of_ss2d_scan(call: dict) -> list[Tensor]:
    """Every route alone: without C the others give nothing."""
    n_state, found = call["A"].shape[1], []
    for k in range(4):
        proj = call["proj"].clone().unflatten(3, (4, -1))
        proj[..., [i for i in range(4) if i != k], -n_state:] = 0
        gradient = derivative("ss2d_scan", {**call, "proj": proj.flatten(3)}, "x", one_hot())
        found.append(gradient.mean(1).flatten())
    return found


def of_routes(operator: str, call: dict, name: str, channels_dim: int) -> list[Tensor]:
    """Scans of sequences that SS2D's routes have made, (1, L, K*., ...) or (1, K*., L)."""
    y = call[name].transpose(1, channels_dim)  # (1, K*., ..)
    seed = cross_scan(one_hot())[0, :, 0]  # (K, L)
    per_route = y.shape[1] // 4 if channels_dim == 1 else call[name].shape[2] // 4
    seed = seed.repeat_interleave(per_route, 0)[None]  # (1, K*., L)
    seed = seed if channels_dim == 1 else seed.mT[..., None]
    gradient = derivative(operator, call, name, seed)
    if channels_dim == 2:
        gradient = gradient.mean(3).mT  # mean over the channels of a head
    routes = gradient.unflatten(1, (4, -1)).mean(2, keepdim=True).unflatten(3, (HEIGHT, WIDTH))
    return list(cross_merge(routes, one_by_one=True)[0, :, 0])


def of_sequence(operator: str, call: dict, name: str, dim: int) -> list[Tensor]:
    """A sequence in the order of the tokens along `dim`: the mean of all other dimensions but it."""
    shape = [1] * call[name].dim()
    shape[dim] = LENGTH
    gradient = derivative(operator, call, name, one_hot().view(shape))
    return [gradient.movedim(dim, 0).flatten(1).mean(1)]


def of_bidirectional(call: dict) -> list[Tensor]:
    return [of_sequence("bidirectional_scan", call, name, 1)[0] for name in ("x_forward", "x_backward")]


def of_two_ways(call: dict) -> list[Tensor]:
    """Half of the heads read the tokens from the end."""
    seed = one_hot().view(1, LENGTH, 1, 1)
    heads = call["x"].shape[2] // 2
    seed = torch.cat([seed.expand(-1, -1, heads, -1), seed.flip(1).expand(-1, -1, heads, -1)], 2)
    there, back = derivative("ssd_chunk_scan", call, "x", seed)[0].chunk(2, 1)
    return [there.flatten(1).mean(1), back.flip(0).flatten(1).mean(1)]


MIXERS = {
    "v05_noz": (lambda: SS2D(8, d_state=1, forward_type="v05_noz", channel_first=True), of_ss2d_scan),
    "v0, 16 states": (lambda: SS2D(8, d_state=16, forward_type="v0"), of_ss2d_scan),
    "v2": (lambda: SS2D(8, d_state=4, forward_type="v2"), of_ss2d_scan),
    "v051d": (lambda: SS2D(8, d_state=2, forward_type="v051d"), of_ss2d_scan),
    "v052d": (lambda: SS2D(8, d_state=2, forward_type="v052d_noz"), of_ss2d_scan),
    "xv1a": (lambda: SS2DXv(8, d_state=2, forward_type="xv1a"), of_ss2d_scan),
    "xv3a": (lambda: SS2DXv(8, d_state=2, forward_type="xv3a", channel_first=True), of_ss2d_scan),
    "xv2a": (
        lambda: SS2DXv(8, d_state=2, forward_type="xv2a"),
        lambda call: of_routes("selective_scan", call, "u", 1),
    ),
    "m0": (
        lambda: SS2DM0(8, d_state=4, dt_rank=2, forward_type="m0_noz", initial_state=True),
        lambda call: of_routes("ssd_chunk_scan", call, "x", 2),
    ),
    "vim v2": (lambda: BiMamba(8, d_state=3), of_bidirectional),
    "vim v1": (lambda: BiMamba(8, d_state=3, bimamba_type="v1"), of_bidirectional),
    "vim none": (
        lambda: BiMamba(8, d_state=3, bimamba_type="none"),
        lambda call: of_sequence("selective_scan", call, "u", 2),
    ),
    "nc-ssd": (lambda: NCSSD(8, d_state=4, headdim=4), lambda call: of_sequence("nc_ssd", call, "x", 1)),
    "nc-ssd, negative, 2 groups": (
        lambda: NCSSD(8, d_state=4, headdim=4, ngroups=2, ssd_positive_dA=False),
        lambda call: of_sequence("nc_ssd", call, "x", 1),
    ),
    "ssd": (
        lambda: NCSSD(8, d_state=4, headdim=4, ngroups=2, linear_attn_duality=False),
        lambda call: of_sequence("ssd_chunk_scan", call, "x", 1),
    ),
    "ssd, both ways": (
        lambda: NCSSD(8, d_state=4, headdim=4, ngroups=2, linear_attn_duality=False, bidirection=True),
        of_two_ways,
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_row_is_the_derivative_of_the_scan(name):
    """CwBdtw of every route at every token of a 3x5 map is dy_query / du_token, a mean over channels, by autograd."""
    make, expected = MIXERS[name]
    mixer = make().double()
    sequence, first = isinstance(mixer, BiMamba), getattr(mixer, "channel_first", False)
    x = torch.randn((1, LENGTH, 8) if sequence else (1, 8, HEIGHT, WIDTH) if first else (1, HEIGHT, WIDTH, 8)).double()
    with recorded(mixer) as calls:
        y = mixer(x)
    assert torch.equal(y, mixer(x)) and len(calls) == 1  # recording changes nothing, and ends
    call = {key: value.detach() if isinstance(value, Tensor) else value for key, value in calls[0][1].items()}
    with torch.no_grad():
        found = sources(mixer, x, (1, LENGTH) if sequence else (HEIGHT, WIDTH), QUERY)
    rows = expected(call)
    assert len(rows) == len(found)
    for source, row in zip(found, rows, strict=True):
        assert row.abs().max() > 1e-9
        torch.testing.assert_close(source.row("CwBdtw", LENGTH), row, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"rope": False}, {"exp_da": False, "ngroups": 2}], ids=str)
def test_a_row_of_the_normalised_form_is_the_derivative_of_the_mixing(options, monkeypatch):
    """Of all that comes after the projections: sum, normaliser, rotations; without the skip connection."""
    mixer, x, seen = LinearNCSSD(8, d_state=4, headdim=4, **options).double(), torch.randn(1, 3, 5, 8).double(), []
    torch.nn.init.zeros_(mixer.D)
    mix = mixer._mix
    monkeypatch.setattr(mixer, "_mix", lambda *args: seen.append(args) or mix(*args))
    with torch.no_grad():
        (source,) = sources(mixer, x, (HEIGHT, WIDTH), QUERY)
    values, *others = seen[0]
    values = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mix(values, *others)[0, QUERY].sum(), values)
    row = gradient[0].flatten(1).mean(1)
    assert row.abs().min() > 1e-9
    torch.testing.assert_close(source.row("CwBdtw", LENGTH), row, rtol=1e-9, atol=1e-14)
    assert source.row("ww", LENGTH).min() > 0
    if options.get("exp_da", True):
        assert source.row("ww", LENGTH).sum().item() == pytest.approx(1)
    if not options.get("rope", True):  # positive weights of the sum 1, but for the small constant
        assert 0.99 < row.sum() < 1


def test_cascade_reads_a_row_and_a_column():
    """Columns are read from what the rows gave; the ways back are added as they come, mirrored."""
    mixer = SS2D(8, d_state=2, forward_type="v052dc_noz").double()
    x = torch.randn(1, HEIGHT, WIDTH, 8).double()
    with recorded(mixer) as calls:
        mixer(x)
    found = sources(mixer, x, (HEIGHT, WIDTH), QUERY)
    row, column = divmod(QUERY, WIDTH)
    tokens = torch.arange(LENGTH).view(HEIGHT, WIDTH)
    for i, (line, step, places) in enumerate(((row, column, tokens[row]), (column, row, tokens[:, column]))):
        call = {key: v.detach() if isinstance(v, Tensor) else v for key, v in calls[i][1].items()}
        seed = torch.zeros_like(call["u"])
        seed[line, :, step] = 1
        there, back = derivative("selective_scan", call, "u", seed)[line].unflatten(0, (2, -1)).mean(1)
        for source, weights in ((found[2 * i], there), (found[2 * i + 1], back.flip(0))):
            expected = torch.zeros(LENGTH).double().index_copy(0, places, weights)
            torch.testing.assert_close(source.row("CwBdtw", LENGTH), expected, rtol=1e-9, atol=1e-14)
    assert [source.name for source in found] == ["row right", "row left", "column down", "column up"]


def test_softmax_attention():
    mixer, x = Attention(8, 2).double(), torch.randn(1, HEIGHT, WIDTH, 8).double()
    (source,) = sources(mixer, x, (HEIGHT, WIDTH), QUERY)
    q, k, _ = mixer.to_qkv(x).view(LENGTH, 3, 2, 4).permute(1, 2, 0, 3)
    expected = F.scaled_dot_product_attention(q, k, torch.eye(LENGTH).double().expand(2, -1, -1))[:, QUERY].mean(0)
    torch.testing.assert_close(source.row("softmax", LENGTH), expected)
    assert source.row("softmax", LENGTH).sum().item() == pytest.approx(1)


# ---- maps ----


def tiny_vmamba(**more) -> VSSM:
    arguments = {"depths": (1, 1), "dims": 8, "ssm_d_state": 2, "patchembed_version": "v2", "forward_type": "v05_noz"}
    return VSSM(**(arguments | more)).eval()


def test_routes_on_a_map_that_is_not_square():
    """A route sees what lies before the query on its way, and nothing else; the maps are stage 0's 4x6 tokens."""
    image, at = torch.randn(1, 3, 16, 24), (2.5 / 6, 1.5 / 4)  # token row 1, column 2
    found = attnmap.attention_maps(tiny_vmamba(), image, at)
    assert found.cell == (1, 2) and found.extent == (0, 1, 1, 0)
    assert list(found.maps) == list(MODES) and found.names["a3"] == "columns back"
    row, column = np.indices((4, 6))
    before = {
        "a0": (row < 1) | ((row == 1) & (column <= 2)),
        "a1": (column < 2) | ((column == 2) & (row <= 1)),
        "a2": (row > 1) | ((row == 1) & (column >= 2)),
        "a3": (column > 2) | ((column == 2) & (row >= 1)),
    }
    for maps in found.maps.values():
        for route, seen in before.items():
            assert np.array_equal(maps[route] != 0, seen)
        routes = [maps[route] for route in before]
        assert np.allclose(maps["all"], sum(routes), atol=0)
        normed = [(m - m.min()) / (m.max() - m.min()) for m in routes]
        assert np.allclose(maps["nall"], np.mean(normed, 0), atol=1e-6)
    assert found.maps["ww"]["a0"].max() == found.maps["ww"]["a0"][1, 2] == 2  # two states, all of both left
    few = attnmap.attention_maps(tiny_vmamba(), image, at, 1, 0, ["CB"], ["nall", "a1"])
    assert {mode: list(maps) for mode, maps in few.maps.items()} == {"CB": ["nall", "a1"]}
    assert few.maps["CB"]["a1"].shape == (2, 3)


@pytest.mark.parametrize("mode", ["middle", "head", "double", "none"])
def test_class_tokens_of_vim_are_left_out(mode):
    """The maps are the rows of the sequence at the patches alone."""
    arguments = {"if_cls_token": False} if mode == "none" else {"cls_mode": mode}
    model = VisionMamba(img_size=(8, 12), patch_size=4, stride=4, depth=2, embed_dim=8, **arguments).eval()
    image = torch.randn(1, 3, 8, 12)
    places = {"middle": [0, 1, 2, 4, 5, 6], "head": range(1, 7), "double": range(1, 7), "none": range(6)}[mode]
    found = attnmap.attention_maps(model, image, (0.5, 0.75))  # token row 1, column 1: patch 4
    assert found.cell == (1, 1) and list(found.names) == ["a0", "a1", "all", "nall"]
    inputs: list[Tensor] = []
    model.layers[1].mixer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(image)
        there, back = sources(model.layers[1].mixer, inputs[0], (1, inputs[0].shape[1]), places[4])
    for route, source in (("a0", there), ("a1", back)):
        row = source.row("CwBdtw", inputs[0].shape[1])[list(places)].view(2, 3).numpy()
        assert np.array_equal(found.maps["CwBdtw"][route], row) and (row != 0).sum() == {"a0": 5, "a1": 2}[route]


@pytest.mark.parametrize("backwards", [{"if_bidirectional": True}, {"flip_img_sequences_ratio": 1.0}])
def test_a_reversed_sequence_is_put_straight(backwards):
    """The second block of a pair, or of some models all, read backwards: first what comes after the query."""
    model = VisionMamba(img_size=8, patch_size=4, stride=4, depth=2, embed_dim=8, **backwards).eval()
    maps = attnmap.attention_maps(model, torch.randn(1, 3, 8, 8), (0.25, 0.75), modes=["ww"]).maps["ww"]  # patch 2
    assert (maps["a0"] != 0).tolist() == [[False, False], [True, True]]
    assert (maps["a1"] != 0).tolist() == [[True, True], [True, False]]


def test_query_between_overlapping_patches():
    """Patches of 16 pixels every 8: the token of a pixel is the one with the nearest centre, and maps begin at 4."""
    model = VisionMamba(img_size=40, patch_size=16, stride=8, depth=1, embed_dim=8).eval()
    image = torch.randn(1, 3, 40, 40)
    for pixel, cell in ((0, 0), (8, 0), (11, 0), (12, 1), (19, 1), (20, 2), (39, 3)):
        found = attnmap.attention_maps(model, image, ((pixel + 0.5) / 40, 0.5 / 40), modes=["CB"])
        assert found.cell == (0, cell)
    assert found.extent == pytest.approx((0.1, 0.9, 0.9, 0.1))


# ---- the command ----


@pytest.fixture
def photo(tmp_path):
    """50x34, grey."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (34, 50), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("model, routes", [("vmamba_nano", 6), ("vim_nano", 4), ("vssd_nano", 1)])
def test_command(model, routes, photo, tmp_path, capsys):
    out = tmp_path / "deep" / "map.png"
    args = ["--model", model, "--image", str(photo), "--query", "49", "0", "--device", "cpu", "--out", str(out)]
    assert main(args) == 0
    assert capsys.readouterr().out.split() == [str(out), str(out.with_suffix(".npz"))]
    written = np.load(out.with_suffix(".npz"))
    assert written["query"].tolist() == [49, 0] and written["cell"].tolist() == [0, 11]
    maps = set(written.files) - {"query", "cell"}
    assert len(maps) == 5 * routes and {written[name].shape for name in maps} == {(8, 12)}
    panels = routes + 1 if routes > 1 else 5 + 1  # per route, or of one route alone per mode, and the image
    assert Image.open(out).size[0] == pytest.approx(150 * (1.7 * (50 / 34) ** 0.5 * panels + 0.5), abs=2)
    # what is written are the model's maps
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    tensor = image_files.to_tensor(image_files.read_image(photo), model, (32, 48))
    found = attnmap.attention_maps(net, tensor, (49.5 / 50, 0.5 / 34))
    assert np.array_equal(written["CwBdtw_a0"], found.maps["CwBdtw"]["a0"]) and written["CwBdtw_a0"].any()


def test_command_draws_softmax_and_other_sizes(photo, tmp_path):
    out = tmp_path / "map.png"
    args = ["--model", "vssd_nano", "--stage", "2", "--image", str(photo), "--size", "64", "--out", str(out)]
    assert main(args) == 0
    written = np.load(out.with_suffix(".npz"))
    assert written["softmax_a0"].shape == (4, 6) and math.isclose(written["softmax_a0"].sum(), 1, rel_tol=1e-5)


def test_checkpoints(photo, tmp_path, capsys):
    """Weights are taken from the checkpoint, and those of another model are refused."""
    torch.manual_seed(1)
    net, file, out = timm.create_model("vmamba_nano", num_classes=3).eval(), tmp_path / "net.pth", tmp_path / "map.png"
    torch.save({"model": net.state_dict()}, file)
    args = ["--image", str(photo), "--checkpoint", str(file), "--out", str(out)]
    assert main([*args, "--model", "vmamba_nano"]) == 0
    tensor = image_files.to_tensor(image_files.read_image(photo), "vmamba_nano", (32, 48))
    found = attnmap.attention_maps(net, tensor, (25.5 / 50, 17.5 / 34))
    assert np.array_equal(np.load(out.with_suffix(".npz"))["CB_all"], found.maps["CB"]["all"])
    capsys.readouterr()
    assert main([*args, "--model", "vim_nano"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "vmamba_nono"], "vmamba_nano"),
        (["--model", "resnet10t"], "give a VMamba, Vim or VSSD"),
        (["--query", "50", "0"], "50x34 pixels"),
        (["--query", "0", "-1"], "outside"),
        (["--stage", "3"], "stages 0..2"),
        (["--block", "1"], "blocks 0..0"),
        (["--mode", "CB,BC"], "--mode BC: this block has CB,CBdt,CwBw,CwBdtw,ww"),
        (["--routes", "a4"], "--routes a4: this block has a0,a1,a2,a3,all,nall"),
        (["--model", "vssd_nano", "--routes", "all"], "this block has a0"),
        (["--model", "vssd_nano", "--stage", "2", "--mode", "CB"], "this block has softmax"),
        (["--size", "8"], "16 pixels"),
        (["--out", "map.npz"], "does not end in .png"),
        (["--image", "missing.png"], "missing.png"),
        (["--model", "vim_nano", "--checkpoint", "missing"], "missing"),
    ],
)
def test_bad_input(args, message, photo, tmp_path, capsys):
    out = tmp_path / "map.png"
    args = args if "--model" in args else ["--model", "vmamba_nano", *args]
    assert main(["--image", str(photo), "--out", str(out), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1 and not out.exists()
