"""VSSD: what its models do beside the contract of timm (test_timm_contract.py), and its arguments."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import reparameterize_model

from ssm_models.layers.nc_ssd import NCSSD
from ssm_models.vssd import VSSD

SMALL = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8), "d_state": 8}


def create(name, **kwargs):
    """A registered model, shrunk so that a test on it is quick."""
    small = {} if name == "vssd_nano" else SMALL
    return timm.create_model(name, num_classes=5, **(small | kwargs))


def settle(model):
    """Running statistics of a few random images, so that BatchNorm does something in eval mode."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def test_no_weight_decay_names_the_scan_parameters():
    model = create("vssd_nano")
    assert model.no_weight_decay() == {
        f"layers.{block}.attn.{leaf}"
        for block in ("0.blocks.0", "1.blocks.0", "1.blocks.1")
        for leaf in ("A_log", "D", "dt_bias")
    }


def test_layer_decay_orders_stem_blocks_downsampling_head():
    model = create("vssd_nano")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    names = [
        "patch_embed.conv1.conv.weight", "layers.0.blocks.0.attn.A_log", "layers.0.downsample.conv.0.conv.weight",
        "layers.1.blocks.0.norm1.weight", "layers.1.blocks.1.cpe2.weight", "layers.1.downsample.conv.1.conv.weight",
        "layers.2.blocks.0.mlp.fc1.weight", "norm.weight", "head.weight",
    ]  # fmt: skip
    scales = [scale[id(model.get_parameter(n))] for n in names]
    steps = [b / a for a, b in zip(scales[:-1], scales[1:], strict=True)]
    # downsampling and the last norm go with the block before them
    assert steps == [2, 1, 2, 2, 1, 2, 1, 2] and scales[-1] == 1.0


def test_drop_path_grows_linearly_over_all_blocks():
    model = create("vssd_tiny", drop_path_rate=0.4)
    rates = [m.drop_prob for n, m in model.named_modules() if n.endswith("drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_values():
    torch.manual_seed(0)
    model = create("vssd_tiny", embed_dim=64, num_heads=(64, 2, 4, 8))
    attn = model.layers[0].blocks[0].attn
    assert torch.equal(attn.D, torch.ones(64))
    A = attn.A_log.exp()
    assert A.min() >= 1 and A.max() <= 16 and A.std().item() == pytest.approx(15 / 12**0.5, rel=0.2)
    steps = torch.nn.functional.softplus(attn.dt_bias)
    assert steps.min() > 0.00099 and steps.max() < 0.1001 and steps.log().std() > 1
    for linear in (
        attn.in_proj,
        attn.out_proj,
        model.layers[3].blocks[0].attn.to_qkv,
        model.layers[1].blocks[0].mlp.fc1,
    ):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.layers[3].blocks[0].attn.to_out.bias.any() and not model.head.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"linear_attn_duality": False}], ids=["nc", "causal"])
def test_half_precision_stays_near_float32(dtype, kwargs):
    model = settle(create("vssd_tiny", drop_path_rate=0.0, **kwargs))
    x = torch.randn(2, 3, 64, 64)
    exact = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.float().square().mean().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    assert (y.float() - exact).norm() <= tolerance * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (model.to(dtype)(x.to(dtype)).float() - exact).norm() <= tolerance * exact.norm()


def test_large_images_do_not_overflow_float16():
    """The state is a sum over all tokens, not a mean: it passes 65504, the largest float16, on large maps."""
    mixer = NCSSD(16, d_state=8, headdim=8)
    torch.nn.init.constant_(mixer.dt_bias, 20.0)
    x = torch.randn(1, 112, 112, 16)
    seen = {}
    mixer.norm.register_forward_pre_hook(lambda _m, args: seen.update(y=args[0]))
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        half = mixer(x)
    assert seen["y"].abs().max() > 65504
    exact = mixer.double()(x.double())
    assert (half - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("name", ["vssd_tiny", "vssd_nano"])
def test_float32_is_within_1e_4_of_float64(name):
    model = settle(create(name))
    x = torch.randn(2, 3, 64, 64)
    single = model(x)
    exact = model.double()(x.double())
    assert (single - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("simple", [False, True])
def test_any_size(simple):
    model = create("vssd_nano", simple_patch_embed=simple, simple_downsample=simple).eval()
    for size in ((32, 32), (33, 47), (61, 35), (20, 90), (5, 4)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_causal_models_compile_as_one_graph_and_export():
    stages = {"depths": (1,), "num_heads": (2,), "attn_types": ("mamba2",)}
    model = create("vssd_nano", **stages, linear_attn_duality=False, ssd_ngroups=2, bidirection=True).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("simple", [False, True])
def test_deployment_folds_every_batch_norm(simple):
    model = settle(create("vssd_tiny", simple_patch_embed=simple))
    deployed = reparameterize_model(model)
    assert not [m for m in deployed.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]  # a copy was changed
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"depht": (1, 1)}, "unexpected keyword argument 'depht'"),
        ({"attn_types": ("mamba2", "mamba", "standard")}, "attn_types: 'mamba' is not one of mamba2, standard"),
        ({"depths": (1, 1)}, "depths [1, 1], num_heads [2, 4, 8] and attn_types ['mamba2', 'mamba2', 'standard'] must"),
        ({"num_heads": (3, 4, 8)}, "num_heads: 3 does not divide the 32 channels of its stage"),
        ({"ssd_ngroups": 3}, "ngroups=3 does not divide the 2 heads"),
        ({"ssd_ngroups": 0}, "ngroups=0 does not divide the 2 heads"),
        ({"linear_attn_duality": False, "bidirection": True}, "bidirection=True needs an even number of groups"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        timm.create_model("vssd_nano", **kwargs)
    assert message in str(caught.value)


def test_published_keyword_names_build_a_model_directly():
    model = VSSD(embed_dim=16, depths=[1, 1], num_heads=[1, 2], d_state=8, attn_types=["mamba2", "standard"])
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
