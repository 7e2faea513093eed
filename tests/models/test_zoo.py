"""VMamba: what its models do beside the contract of timm (test_timm_contract.py), and its arguments."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from ssm_models import VSSM, DenseVSSM, from_upstream
from ssm_models.layers.forward_type import ForwardType, parse_forward_type

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}


def create(name, **kwargs):
    """A registered model, shrunk so that a test on it is quick."""
    small = {} if name == "vmamba_nano" else SMALL
    return timm.create_model(name, num_classes=5, **(small | kwargs))


def test_no_weight_decay_names_the_scan_parameters():
    model = create("vmamba_nano", posembed=True, imgsize=32)
    expected = {n for n, _ in model.named_parameters() if n.endswith((".A_logs", ".Ds", ".dt_projs_bias"))} | {
        "pos_embed"
    }
    assert model.no_weight_decay() == expected and len(expected) == 13


def test_layer_decay_orders_stem_blocks_downsampling_head():
    model = create("vmamba_nano")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    names = [
        "patch_embed.0.weight", "layers.0.blocks.0.op.A_logs", "layers.0.downsample.1.weight",
        "layers.1.blocks.0.norm.weight", "layers.1.blocks.1.norm.weight", "layers.1.downsample.1.weight",
        "layers.2.blocks.0.mlp.fc1.weight", "classifier.norm.weight", "classifier.head.weight",
    ]  # fmt: skip
    scales = [scale[id(model.get_parameter(n))] for n in names]
    steps = [b / a for a, b in zip(scales[:-1], scales[1:], strict=True)]
    # downsampling and the last norm go with the block before them
    assert steps == [2, 1, 2, 2, 1, 2, 1, 2] and scales[-1] == 1.0


def test_drop_path_grows_linearly_over_all_blocks():
    model = create("vmamba_tiny_s1l8", drop_path_rate=0.4)
    rates = [m.drop_prob for n, m in model.named_modules() if n.endswith("drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_values():
    torch.manual_seed(0)
    model = create("vmamba_tiny_s1l8", ssm_d_state=4, dims=(64, 64, 64, 64))
    op = model.layers[0].blocks[0].op
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 5.0).expand(256, 4))
    assert torch.equal(op.Ds, torch.ones(256))
    steps = torch.nn.functional.softplus(op.dt_projs_bias)
    assert steps.min() > 0.00099 and steps.max() < 0.1001 and steps.log().std() > 1
    assert op.x_proj_weight.abs().max() <= 64**-0.5 and op.dt_projs_weight.abs().max() <= op.dt_rank**-0.5
    assert op.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for init, value in (("v1", None), ("v2", 0.0)):
        op = create("vmamba_nano", ssm_init=init).layers[0].blocks[0].op
        assert value is None or torch.equal(op.A_logs, torch.zeros_like(op.A_logs))
        assert init == "v2" or op.A_logs.std().item() == pytest.approx(1, rel=0.3)
        assert op.dt_projs_bias.abs().max() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vanilla_vmamba_tiny", "vmamba_nano"])
def test_half_precision_stays_near_float32(name, dtype):
    model = create(name, drop_path_rate=0.0)
    x = torch.randn(2, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.float().square().mean().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    assert (y.float() - exact).norm() <= tolerance * exact.norm()
    assert (model.to(dtype)(x.to(dtype)).float() - exact).norm() <= tolerance * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("downsample_version", ["v1", "v2", "v3", "none"])
def test_any_size_gives_the_same_in_both_layouts(downsample_version):
    dims = (16, 16, 16) if downsample_version == "none" else (16, 24, 32)
    kwargs = {"downsample_version": downsample_version, "dims": dims}
    last = create("vmamba_nano", norm_layer="ln", **kwargs).eval()
    first = create("vmamba_nano", norm_layer="ln2d", **kwargs).eval()
    first.load_state_dict(last.state_dict(), strict=True)
    for size in ((32, 32), (33, 47), (61, 35), (20, 90)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(first(x), last(x), rtol=1e-4, atol=1e-5)
    sides = [m.shape[2] for m in first.forward_intermediates(torch.randn(1, 3, 45, 45), intermediates_only=True)]
    assert sides == {"v1": [12, 6, 3], "v2": [12, 6, 3], "v3": [12, 6, 3], "none": [12, 12, 12]}[downsample_version]
    sides = [m.shape[2] for m in first.forward_intermediates(torch.randn(1, 3, 28, 28), intermediates_only=True)]
    assert sides == {"v1": [7, 4, 2], "v2": [7, 3, 1], "v3": [7, 4, 2], "none": [7, 7, 7]}[downsample_version]
    assert [i["reduction"] for i in first.feature_info] == ([4, 4, 4] if downsample_version == "none" else [4, 8, 16])


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_backbone_adds_the_position_embedding(norm_layer):
    kwargs = SMALL | {"norm_layer": norm_layer, "posembed": True, "imgsize": 64, "forward_type": "v05_noz"}
    backbone, model = DenseVSSM(**kwargs).eval(), VSSM(**kwargs, num_classes=5).eval()
    weights = {n: v for n, v in model.state_dict().items() if not n.startswith("classifier")}
    missing = backbone.load_state_dict(weights, strict=False).missing_keys
    assert sorted(missing) == [f"outnorm{i}.{kind}" for i in range(4) for kind in ("bias", "weight")]
    for size in (64, 96):  # as trained, and resized
        x = torch.randn(1, 3, size, size)
        expected = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(backbone(x)[3], expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            moved = backbone.pos_embed.add_(torch.randn_like(backbone.pos_embed))
        assert not torch.allclose(backbone(x)[3], expected, rtol=1e-2, atol=1e-2)
        model.pos_embed.data.copy_(moved)


def test_dense_backbone_picks_stages():
    model = DenseVSSM(out_indices=(1, 3), **SMALL, norm_layer="ln2d", forward_type="v05_noz", ssm_d_state=1)
    maps = model(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 16, 8, 12), (1, 32, 2, 3)] and all(m.is_contiguous() for m in maps)
    names = {n.split(".")[0] for n in model.state_dict()}
    assert names == {"patch_embed", "layers", "outnorm1", "outnorm3"}
    with pytest.raises(ValueError, match=r"out_indices=\(0, 4\) must name stages 0..3"):
        DenseVSSM(out_indices=(0, 4), **SMALL)


def test_forward_type_grammar():
    assert parse_forward_type("v05_noz") == ForwardType(gate=False)
    assert parse_forward_type("v0") == ForwardType(scan_fp32=True, fixed=True) == parse_forward_type("v0seq")
    assert parse_forward_type("v03_oncnorm_nozact_oact_no32") == ForwardType(
        gate_act=False, out_act=True, out_norm="cnorm"
    )
    assert parse_forward_type("v2") == ForwardType(scan_fp32=True) == parse_forward_type("v01")
    assert parse_forward_type("v2_onsoftmax_nozact") == ForwardType(scan_fp32=True, gate_act=False, out_norm="softmax")
    assert parse_forward_type("v051d").scans == "unidi" and parse_forward_type("v052d").scans == "bidi"


@pytest.mark.parametrize("name", ["v05_noz_onnone", "v9", "v0_noz", "", "v05_noz_nozact", "v05_onfoo", "V05"])
def test_unknown_or_misordered_forward_type_names_the_legal_ones(name):
    with pytest.raises(ValueError, match=f"forward_type='{name}' is not known. Legal: v0, v0seq, or a base of v01"):
        create("vmamba_nano", forward_type=name)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depth": (1, 1)}, "unexpected keyword argument 'depth'"),
        ({"norm_layer": "rms"}, "norm_layer='rms' is not one of ln, ln2d, bn"),
        ({"downsample_version": "v4"}, "downsample_version='v4' is not one of v1, v2, v3, none"),
        ({"downsample_version": "none"}, "cannot change 32 channels to 64"),
        ({"patchembed_version": "v3"}, "patchembed_version='v3' is not one of v1, v2"),
        ({"ssm_act_layer": "swish"}, "activation 'swish' is not one of silu, gelu, relu, sigmoid"),
        ({"ssm_init": "v3"}, "ssm_init='v3' is not one of v0, v1, v2"),
        ({"ssm_conv": 4}, "d_conv=4 must be odd"),
        ({"dims": (8, 16)}, "must have one entry per stage"),
        ({"forward_type": "v0"}, "v05 leaves the choice"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        timm.create_model("vmamba_nano", **kwargs)
    assert message in str(caught.value)


def test_from_upstream_reads_yaml_sections():
    vssm = {
        "EMBED_DIM": 16,
        "DEPTHS": [1, 1, 1, 1],
        "SSM_D_STATE": 1,
        "SSM_RANK_RATIO": 2.0,
        "SSM_FORWARDTYPE": "v3_noz",
    }
    section = {"TYPE": "vssm", "NAME": "mine", "DROP_PATH_RATE": 0.2, "NUM_CLASSES": 11, "VSSM": vssm}
    model = from_upstream("vmamba", section)
    assert isinstance(model, VSSM) and model.dims == [16, 32, 64, 128] and model.num_classes == 11
    assert len(model.patch_embed) == 8 and model.layers[0].downsample[1].kernel_size == (2, 2)
    section["VSSM"]["DEPHTS"] = [1]
    with pytest.raises(ValueError, match="DEPHTS"):
        from_upstream("vmamba", section)


def test_from_upstream_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="'vmamba_huge' is not a published VMamba; known: vanilla_vmamba_tiny"):
        from_upstream("vmamba", "vmamba_huge")
    with pytest.raises(ValueError, match="family='swin'"):
        from_upstream("swin", {})
    with pytest.raises(ValueError, match="unexpected keyword argument 'depht'"):
        from_upstream("vmamba", {"depht": 3})
    assert len(from_upstream("vmamba", {"ssm_rank_ratio": 2.0, "forward_type": "v31d_noz", **SMALL}).layers) == 4
