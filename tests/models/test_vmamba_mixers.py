"""The xv and m0 mixers: against the formulas written out token by token, and the contract every mixer keeps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_exportable

from ssm_models import VSSM, DenseVSSM, load_checkpoint
from ssm_models.layers.forward_type import ForwardType, XvForwardType, parse_forward_type, parse_m0, parse_xv
from ssm_models.layers.ss2d import SS2D
from ssm_models.layers.ss2d_m0 import SS2DM0
from ssm_models.layers.ss2d_xv import SS2DXv
from tests.models.golden import fill_model

C, N, R, K = 8, 3, 2, 4
XV = ["xv1a_ocov_ocov2_ca1_act_mul", "xv1a_ocov2_ca", "xv2a_ocov_ca_mul_onsigmoid", "xv2a_cpos_ca1", "xv3a_act_oncnorm"]
M0 = ["m0", "m0_noz", "m0_nozact_oact", "m0_onsoftmax_noz_no32", "m0_ondwconv3"]
MIXERS = [(SS2DXv, name) for name in XV] + [(SS2DM0, name) for name in M0]


def mixer(kind, name, channel_first=False, **changes):
    arguments = {"d_model": C, "d_state": N, "dt_rank": R, "ssm_ratio": 1.5}
    return kind(**(arguments | changes), forward_type=name, channel_first=channel_first)


def routes(height, width):
    rows = list(itertools.product(range(height), range(width)))
    columns = [(i, j) for j in range(width) for i in range(height)]
    return rows, columns, rows[::-1], columns[::-1]


def conv(module, x):
    y = F.conv2d(x.permute(0, 3, 1, 2), module.weight, module.bias, padding=module.padding, groups=module.groups)
    return y.permute(0, 2, 3, 1)


def plain_xv(op, x, name):
    """The definition of `SS2DXv` with nothing clever: x (B, H, W, C), every token of every route by itself."""
    mode, *parts = name.split("_")
    act = F.silu if "ca" in parts else F.gelu if "ca1" in parts else (lambda t: t)
    if not {"ocov", "ocov2"} & set(parts):
        x = act(conv(op.conv2d, x))
    p = x @ op.in_proj.weight.T
    if "ocov2" in parts:
        p = conv(op.conv2d, p)
    D = op.Ds.numel() // K
    u, dt, B, C_ = p.split([D, p.shape[3] - D - 2 * K * N, K * N, K * N], dim=3)
    y = torch.zeros_like(u)
    for k, route in enumerate(routes(*x.shape[1:3])):
        rows, h = slice(k * D, (k + 1) * D), 0.0
        for i, j in route:
            step = dt[:, i, j, k * R : (k + 1) * R] if mode == "xv3a" else dt[:, i, j]
            if mode != "xv2a":
                step = step @ op.dt_projs_weight[k].T
            step = F.softplus(step + op.dt_projs_bias[k])[:, :, None]
            b, c = (t[:, i, j, None, k * N : (k + 1) * N] for t in (B, C_))
            h = torch.exp(-op.A_logs[rows].exp() * step) * h + step * b * u[:, i, j, :, None]
            y[:, i, j] += (h * c).sum(2) + op.Ds[rows] * u[:, i, j]
    y = op.out_norm(y)
    y = F.gelu(y) if "act" in parts else y
    y = y * u if "mul" in parts else y
    if "ocov" in parts:
        y = y + act(conv(op.oconv2d, u))
    return y @ op.out_proj.weight.T


def plain_m0(op, x, name):
    """The definition of `SS2DM0` with nothing clever."""
    parts = name.split("_")[1:]
    x = x @ op.in_proj.weight.T
    if "noz" not in parts:
        x, gate = x.chunk(2, dim=3)
        gate = gate if "nozact" in parts else F.silu(gate)
    x = F.silu(conv(op.conv2d[1], x))
    D = x.shape[3]
    y = torch.zeros_like(x)
    for k, route in enumerate(routes(*x.shape[1:3])):
        h = 0.0 if op.initial_state is None else op.initial_state[:, k * R : (k + 1) * R]
        for i, j in route:
            dt, b, c = (x[:, i, j] @ op.x_proj_weight[k].T).split([R, N, N], dim=1)
            dt = F.softplus(dt + op.dt_projs_bias[k])[:, :, None, None]  # (B, R, 1, 1)
            heads = x[:, i, j].unflatten(1, (R, D // R))
            h = torch.exp(-op.A_logs[k].exp()[:, None, None] * dt) * h + dt * heads[..., None] * b[:, None, None]
            y[:, i, j] += ((h * c[:, None, None]).sum(3) + op.Ds[k] * heads).flatten(1)
    y = op.out_norm(y)
    y = F.gelu(y) if "oact" in parts else y
    y = y if "noz" in parts else y * gate
    return y @ op.out_proj.weight.T


@pytest.mark.parametrize("kind, name", MIXERS)
def test_the_formulas_written_out(kind, name):
    op = fill_model(mixer(kind, name)).double()
    x = torch.randn(2, 3, 4, C, dtype=torch.float64)
    expected = (plain_xv if kind is SS2DXv else plain_m0)(op, x, name)
    torch.testing.assert_close(op(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind, name", [*MIXERS, (SS2D, "v05_oncnorm_oact"), (SS2D, "v052dc_noz")])
def test_both_layouts_compute_the_same(kind, name):
    last, first = fill_model(mixer(kind, name)).double(), mixer(kind, name, channel_first=True).double()
    first.load_state_dict(last.state_dict(), strict=True)
    x = torch.randn(2, 5, 7, C, dtype=torch.float64)
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), last(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("kind, name", MIXERS)
def test_implementations_agree_forward_and_backward(kind, name, channel_first):
    fast, plain = (mixer(kind, name, channel_first, impl=impl) for impl in ("auto", "reference"))
    plain.load_state_dict(fill_model(fast).state_dict())
    shape = (2, C, 9, 13) if channel_first else (2, 9, 13, C)
    outputs = []
    for op in (fast, plain):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = op(x)
        y.square().sum().backward()
        outputs.append({"y": y, "x": x.grad} | {n: p.grad for n, p in op.named_parameters()})
    for key, expected in outputs[1].items():
        assert (outputs[0][key] - expected).norm() <= 1e-5 * expected.norm(), key
        assert expected.norm() > 0, key


@pytest.mark.parametrize(
    "kind, name, channel_first",
    [(SS2DXv, XV[0], True), (SS2DXv, "xv2a", False), (SS2DXv, "xv3a_ocov2", True), (SS2DM0, "m0", False)],
)
def test_compiles_as_one_graph_and_exports(kind, name, channel_first):
    op = mixer(kind, name, channel_first)
    x = torch.randn((2, C, 5, 6) if channel_first else (2, 5, 6, C))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, op(x), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert all(p.grad is not None for p in op.parameters())
    torch.testing.assert_close(torch.export.export(op.eval(), (x,)).module()(x), op(x))
    with set_exportable(True):
        plain = mixer(kind, name, channel_first).eval()
    plain.load_state_dict(op.state_dict())
    exported = torch.export.export(plain, (x,))
    assert not [node for node in exported.graph.nodes if "ssm_ops" in str(node.target)]
    torch.testing.assert_close(exported.module()(x), op(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, name", MIXERS)
def test_half_precision_stays_near_float32(kind, name, dtype):
    op = fill_model(mixer(kind, name))
    x = torch.randn(2, 5, 7, C)
    exact = op(x)
    with torch.autocast("cpu", dtype=dtype):
        y = op(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and all(p.grad.isfinite().all() for p in op.parameters())
    tolerance = 8 * torch.finfo(dtype).eps
    assert (y.float() - exact).norm() <= tolerance * exact.norm()
    assert (op.to(dtype)(x.to(dtype)).float() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("init", ["v0", "v1", "v2"])
@pytest.mark.parametrize("kind, name", [(SS2DXv, "xv1a"), (SS2DXv, "xv2a"), (SS2DM0, "m0")])
def test_initial_values(kind, name, init):
    op = mixer(kind, name, d_model=64, d_state=16, dt_rank=16, ssm_ratio=1.0, initialize=init)
    assert torch.equal(op.Ds, torch.ones_like(op.Ds))
    A, bias = op.A_logs.exp(), op.dt_projs_bias
    if init == "v0":
        steps = F.softplus(bias)
        assert steps.min() > 0.00099 and steps.max() < 0.1001 and steps.log().std() > 1
        if kind is SS2DXv:
            torch.testing.assert_close(A, torch.arange(1.0, 17).expand(256, 16))
        else:
            assert 1 <= A.min() < 2 and 15 < A.max() <= 16
    elif init == "v1":
        assert op.A_logs.std().item() == pytest.approx(1, rel=0.3)
        assert bias.std().item() == pytest.approx(1.0 if kind is SS2DXv else 0.1, rel=0.3)
    else:
        assert torch.equal(A, torch.ones_like(A)) and bias.min() >= 0 and 0.09 < bias.max() <= 0.1
    if name == "xv1a":
        spread = {"v0": 16**-0.5 / 3**0.5, "v1": 1.0, "v2": 0.1 / 12**0.5}[init]
        assert op.dt_projs_weight.std().item() == pytest.approx(spread, rel=0.1)
    assert hasattr(op, "dt_projs_weight") == (name == "xv1a")


def test_initial_state_is_read_loaded_and_left_alone(tmp_path):
    op = mixer(SS2DM0, "m0", initial_state=True)
    assert op.initial_state.shape == (1, K * R, 6, N) and not op.initial_state.requires_grad
    plain = mixer(SS2DM0, "m0")
    plain.load_state_dict({n: v for n, v in op.state_dict().items() if n != "initial_state"}, strict=True)
    x = torch.randn(2, 3, 4, C)
    torch.testing.assert_close(op(x), plain(x))
    torch.nn.init.normal_(op.initial_state)
    before = op.initial_state.clone()
    op(x).sum().backward()
    assert torch.equal(op.initial_state, before) and op.initial_state.grad is None
    double = op.double()
    torch.testing.assert_close(double(x.double()), plain_m0(double, x.double(), "m0"), rtol=1e-10, atol=1e-10)

    small = {"depths": (1, 1), "dims": 16, "num_classes": 3, "forward_type": "m0_noz"}
    model = VSSM(**small, ssm_initial_state=True)
    torch.nn.init.normal_(model.layers[0].blocks[0].op.initial_state)
    torch.save(model.state_dict(), tmp_path / "m0.pth")
    other = VSSM(**small, ssm_initial_state=True)
    load_checkpoint(other, tmp_path / "m0.pth")
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other.eval()(image), model.eval()(image))
    with pytest.raises(ValueError, match="ssm_initial_state is an option of forward_type m0, not of 'v05'"):
        VSSM(**(small | {"forward_type": "v05"}), ssm_initial_state=True)


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d", "bn"])
@pytest.mark.parametrize("forward_type", ["xv1a_act", "xv2a_mul", "xv3a_ocov", "m0"])
def test_whole_models(forward_type, norm_layer):
    small = {"depths": (1, 1), "dims": 16, "num_classes": 3, "norm_layer": norm_layer, "forward_type": forward_type}
    model = VSSM(**small, ssm_d_state=2)
    model(torch.randn(2, 3, 45, 38)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    maps = DenseVSSM(**small, out_indices=(0, 1))(torch.randn(2, 3, 45, 38))
    assert [m.shape for m in maps] == [(2, 16, 11, 9), (2, 32, 5, 4)]
    assert sum(n.endswith(("A_logs", "Ds", "dt_projs_bias")) for n in model.no_weight_decay()) == 6


def test_the_default_forward_type_runs():
    assert VSSM(depths=(1, 1), dims=16, num_classes=3)(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_grammar():
    assert parse_xv("xv1a") == XvForwardType("shared") == parse_xv("xv1a_cpos")
    assert parse_xv("xv3a_ocov_ca1_act_mul_oncnorm") == XvForwardType(
        "routed", in_conv=False, out_conv=True, conv_act="gelu", out_act=True, mul=True, out_norm="cnorm"
    )
    assert parse_xv("xv2a_ocov2_ca") == XvForwardType("given", in_conv=False, proj_conv=True, conv_act="silu")
    assert parse_m0("m0_onnone_nozact_oact_no32") == ForwardType(gate_act=False, out_act=True, out_norm="none")
    assert parse_m0("m0_noz") == parse_forward_type("v05_noz") and parse_forward_type("v4") == ForwardType()


LEGAL_XV = "xv1a, xv2a, xv3a, then in this order _cpos or _ocov, _ocov2, one of _ca, _ca1, then _act, _mul, at most one"


@pytest.mark.parametrize(
    "name",
    ["xv4a", "xv1", "xv6", "xv1a_noz", "xv1a_mul_act", "xv1a_ca_ocov", "xv1a_oncnorm_act", "xv1a_cpos_ocov2"]
    + ["xv1a_ca_ca1", "m1", "m0_noz_onnone", "m0_noz_nozact", "m0d", "mamba", "v052d3", "v3noz", "v05_act"],
)
def test_unknown_or_misordered_names_tell_the_legal_ones(name):
    with pytest.raises(ValueError) as caught:
        VSSM(depths=(1,), dims=16, forward_type=name)
    message = str(caught.value)
    assert f"forward_type={name!r} is not known. Legal: v0, v0seq, or a base of v01, v02" in message
    assert "m0 with the same (SS2DM0)" in message and LEGAL_XV in message


@pytest.mark.parametrize(
    "kind, name, changes, message",
    [
        (SS2DXv, "xv1a_ocov", {"d_conv": -1}, "forward_type='xv1a_ocov' describes convolutions, but there are none"),
        (SS2DXv, "xv1a_ca", {"d_conv": 1}, "describes convolutions, but there are none: conv 1"),
        (SS2DXv, "xv1a", {"d_conv": 4}, "d_conv=4 must be odd"),
        (SS2DXv, "xv1a", {"act_layer": "gelu"}, "forward_type='xv1a' has no use for act 'gelu'"),
        (SS2DXv, "xv1a", {"initialize": "v3"}, "ssm_init='v3' is not one of v0, v1, v2"),
        (SS2DM0, "m0", {"initialize": "v3"}, "ssm_init='v3' is not one of v0, v1, v2"),
        (SS2DM0, "m0", {"dt_rank": 5}, "forward_type='m0': dt_rank=5, the heads, must divide the 12 channels"),
        (SS2DM0, "m0", {"d_conv": 2}, "d_conv=2 must be odd"),
        (SS2D, "xv1a", {}, "forward_type='xv1a' is not known"),
    ],
)
def test_bad_arguments_are_named(kind, name, changes, message):
    with pytest.raises(ValueError) as caught:
        mixer(kind, name, **changes)
    assert message in str(caught.value)
