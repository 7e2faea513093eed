"""Vim: what its models do beside the contract of timm (test_timm_contract.py), its arguments, and its backbones."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from ssm_models import DenseVisionMamba
from ssm_models.vim import VisionMamba
from ssm_ops._library import OPERATORS, available

SMALL = {"depth": 2, "embed_dim": 32}


def create(name, **kwargs):
    """A registered model, shrunk so that a test on it is quick."""
    return timm.create_model(name, **({"num_classes": 5} | SMALL | kwargs))


def nano(**kwargs):
    """8x8 patches of 32x32 pixels."""
    return create("vim_nano", **({"drop_path_rate": 0.0} | kwargs))


def test_stopping_early_runs_no_block_too_many():
    model = nano(depth=3)
    ran = []
    for i, block in enumerate(model.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(torch.randn(1, 3, 32, 32), [1], stop_early=True, intermediates_only=True)
    assert ran == [0, 1]


@pytest.mark.parametrize(
    "kwargs, prefix",
    [({"cls_mode": "double"}, 2), ({"cls_mode": "head"}, 1), ({"cls_mode": "middle"}, 1), ({"if_cls_token": False}, 0)],
)
def test_prefix_tokens_of_all_modes(kwargs, prefix):
    model = nano(**kwargs).eval()
    features, [*_, (patches, tokens)] = model.forward_intermediates(
        torch.randn(2, 3, 32, 32), norm=True, output_fmt="NLC", return_prefix_tokens=True
    )
    assert patches.shape == (2, 64, 32) and tokens.shape == (2, prefix, 32)
    if kwargs.get("cls_mode") == "middle":
        features = torch.cat([features[:, 32:33], features[:, :32], features[:, 33:]], 1)
    first, last = features[:, :1], features[:, -1:]
    want = [torch.cat(t, 1) for t in ([patches], [first, patches], [first, patches, last])][prefix]
    torch.testing.assert_close(tokens, torch.cat([first, last][:prefix], 1) if prefix else features[:, :0])
    torch.testing.assert_close(features, want)


def test_pairs_of_blocks_give_one_map():
    model = nano(depth=4, if_bidirectional=True, bimamba_type="none").eval()
    x = torch.randn(1, 3, 32, 32)
    features, maps = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True)
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[3][1], features[:, 32:33])
    assert (maps[1][0] - maps[2][0]).abs().max() > 1e-3
    for index in (0, 1):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([index]) == [index] and len(pruned.layers) == 2
        got = pruned.forward_intermediates(x, [index], norm=True, output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(got[0], maps[1][0])


@pytest.mark.parametrize("mode", ["middle", "double"])
def test_no_weight_decay_names_tokens_positions_and_the_scan(mode):
    tokens = {"middle": {"cls_token"}, "double": {"cls_token_head", "cls_token_tail"}}[mode]
    leaves = ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")
    scan = {f"layers.{i}.mixer.{leaf}" for i in (0, 1) for leaf in leaves}
    assert nano(cls_mode=mode).no_weight_decay() == {"pos_embed"} | tokens | scan


def test_layer_decay_orders_stem_blocks_head():
    model = nano(depth=3)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    names = [
        "patch_embed.proj.weight", "pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.0.norm.weight",
        "layers.1.mixer.out_proj.weight", "layers.2.mixer.D_b", "norm_f.weight", "head.weight",
    ]  # fmt: skip
    scales = [scale[id(model.get_parameter(n))] for n in names]
    steps = [b / a for a, b in zip(scales[:-1], scales[1:], strict=True)]
    assert steps == [1, 1, 2, 1, 2, 2, 1, 2] and scales[-1] == 1.0  # the last norm goes with the last block


@pytest.mark.parametrize("kwargs", [{}, {"cls_mode": "double"}, {"rms_norm": False, "init_layer_scale": 0.1}], ids=str)
def test_every_parameter_has_one_layer_group(kwargs):
    model = nano(**kwargs)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        names = [name for group in groups.values() for name in group]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
        assert len(groups) == 4  # stem, two blocks, head
        assert set(groups[3]) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"rms_norm": False, "bimamba_type": "v1"},
        {"if_rope": True, "if_rope_residual": True, "residual_in_fp32": False, "init_layer_scale": 1.0},
        {"if_abs_pos_embed": False, "cls_mode": "double"},
    ],
    ids=str,
)
def test_half_precision_stays_near_float32(dtype, kwargs):
    model = nano(**kwargs)
    x = torch.randn(2, 3, 32, 48)
    exact = model(x)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    y.float().square().mean().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    assert (y.float() - exact).norm() <= tolerance * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = model.to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype and (y.float() - exact).norm() <= tolerance * exact.norm()
    for norm in (False, True):
        features, maps = half.forward_intermediates(x.to(dtype), norm=norm)
        assert {m.dtype for m in (features, *maps)} == {dtype}
    y.square().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())


def test_the_residual_stream_is_kept_in_float32():
    seen = []
    for kept in (True, False):
        model = nano(residual_in_fp32=kept).bfloat16()
        model.layers[1].register_forward_hook(lambda _m, _i, out: seen.append(out[1].dtype))
        model(torch.randn(1, 3, 32, 32).bfloat16())
    assert seen == [torch.float32, torch.bfloat16]
    model = nano().double()
    model.layers[1].register_forward_hook(lambda _m, _i, out: seen.append(out[1].dtype))
    assert model(torch.randn(1, 3, 32, 32).double()).dtype == seen[-1] == torch.float64


@pytest.mark.parametrize("name", ["vim_tiny_patch16_stride8_224", "vim_nano"])
def test_float32_is_within_1e_4_of_float64(name):
    model = create(name, depth=4).eval()
    x = torch.randn(2, 3, 64, 64)
    single = model(x)
    exact = model.double()(x.double())
    assert (single - exact).norm() <= 1e-4 * exact.norm()


def test_implementations_agree_over_a_model():
    kinds = available(OPERATORS["selective_scan"], "cpu", torch.float32)
    x = torch.randn(2, 3, 32, 32)
    outputs = {}
    for impl in ("auto", *kinds):
        torch.manual_seed(0)
        model = nano(scan_impl=impl)
        y = model(x)
        y.square().mean().backward()
        outputs[impl] = [y, *(p.grad for p in model.parameters())]
    assert "reference" in outputs
    for impl, got in outputs.items():
        for a, b in zip(got, outputs["reference"], strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), impl


@pytest.mark.parametrize("kwargs", [{}, {"if_rope": True}, {"stride": 2}, {"if_cls_token": False}], ids=str)
def test_any_size(kwargs):
    model = nano(**kwargs).eval()
    for size in ((32, 32), (33, 47), (61, 35), (20, 90), (4, 5)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    with pytest.raises(ValueError, match="an image of 3x40 pixels is smaller than a patch of 4x4"):
        model(torch.randn(1, 3, 3, 40))


@pytest.mark.parametrize(
    "kwargs",
    [{"cls_mode": "double", "if_rope": True, "if_rope_residual": True}, {"bimamba_type": "v1", "rms_norm": False}],
    ids=str,
)
def test_compiles_as_one_graph_and_exports(kwargs):
    model = nano(**kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_sequences_in_random_order_compile():
    model = nano(drop_path_rate=0.1, cls_mode="random", flip_img_sequences_ratio=0.5, if_rope=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_copies_are_equal():
    model = nano(if_rope=True).eval()
    x = torch.randn(1, 3, 32, 48)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.load_state_dict(nano(if_rope=True, img_size=64).state_dict())  # with a conversion of its own
        assert twin.grid == (8, 8) and not torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"dept": 3}, "unexpected keyword argument 'dept'"),
        ({"ssm_cfg": {"dconv": 3}}, "unexpected keyword argument 'dconv'"),
        ({"bimamba_type": "v3"}, "bimamba_type='v3' is not one of none, v1, v2"),
        ({"final_pool_type": "men"}, "pooling 'men' is not one of token, none, mean, max, all"),
        ({"final_pool_type": "token", "if_cls_token": False}, "pooling 'token' is not one of none, mean, max, all"),
        (
            {"global_pool": "median"},
            "pooling 'median' is not one of token, none, mean, max, all, avg, avgmax",
        ),
        ({"cls_mode": "centre"}, "cls_mode='centre' is not one of middle, head, tail, double, random"),
        ({"img_size": 3}, "an image of 3x3 pixels is smaller than a patch of 4x4"),
        ({"depth": 3, "if_bidirectional": True}, "depth=3 must be even with if_bidirectional"),
        ({"embed_dim": 34, "if_rope": True}, "embed_dim=34 must be a multiple of 4 for rotary position embeddings"),
        ({"scan_impl": "fast"}, "impl='fast'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        nano(**kwargs)(torch.randn(1, 3, 32, 32))
    assert message in str(caught.value)


def test_published_keyword_names_build_a_model_directly():
    model = VisionMamba(32, 8, 8, 2, 16, 4, num_classes=3, ssm_cfg={"d_conv": 3, "expand": 1, "dt_rank": 2})
    mixer = model.layers[0].mixer
    assert mixer.A_log.shape == (16, 4) and mixer.conv1d.weight.shape == (16, 1, 3) and mixer.dt_rank == 2
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


# ---- dense ----


def dense(**kwargs):
    return DenseVisionMamba(**({"img_size": 64, "out_indices": (0, 1, 2, 3), "depth": 4, "embed_dim": 16} | kwargs))


@pytest.mark.parametrize("stride, grid", [(16, (4, 6)), (8, (7, 11))])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1,)])
def test_pyramid(stride, grid, out_indices):
    model = dense(stride=stride, out_indices=out_indices)
    maps = model(torch.randn(2, 3, 64, 96))
    up = (4, 2, 1) if stride == 16 else (2, 1)
    sizes = [(grid[0] * k, grid[1] * k) for k in up] + [(grid[0] // k, grid[1] // k) for k in (2, 4)]
    assert [tuple(m.shape) for m in maps] == [(2, 16, *size) for size in sizes[:4]]
    assert all(m.is_contiguous() for m in maps)
    names = {n.removeprefix("fpn") for n in model.state_dict() if n.startswith("fpn")}
    ups = {16: ("1.0", "1.3", "2.0"), 8: ("1.0",)}[stride]
    assert {n for n in names if n.endswith("weight") and not n.startswith("1.1")} == {f"{n}.weight" for n in ups}
    assert not [n for n in model.state_dict() if n.startswith(("head", "cls_token"))]


def test_maps_are_what_blocks_add_or_the_residual_stream():
    kwargs = {"if_fpn": False, "out_indices": (1, 3)}
    x = torch.randn(1, 3, 64, 64)
    taps = []
    models = [
        dense(**kwargs),
        *(dense(**kwargs, use_residual_as_feature=True, last_layer_process=p) for p in ("none", "add", "add & norm")),
    ]
    for block in models[0].layers:
        block.register_forward_hook(lambda _m, _i, out: taps.append(out))
    maps, norm = [], models[-1].norm_f
    for model in models:
        theirs = norm.state_dict(prefix="norm_f.") if model is models[-1] else {}
        model.load_state_dict(models[0].state_dict() | theirs)
        maps.append([m.flatten(2).mT for m in model.eval()(x)])
    (_, _), (h1, _), (_, r2), (h3, r3) = taps
    last = (h3, h3, r3 + h3, norm(r3 + h3))
    for got, first, second in zip(maps, (h1, r2, r2, r2), last, strict=True):
        torch.testing.assert_close(got[0], first)
        torch.testing.assert_close(got[1], second)


def test_blocks_after_the_last_map_are_not_there():
    model, pairs = (dense(out_indices=(0,), if_fpn=False, if_bidirectional=pairs) for pairs in (False, True))
    assert model(torch.randn(1, 3, 64, 64))[0].shape == (1, 16, 4, 4)
    assert (len(model.layers), len(pairs.layers)) == (1, 2)  # pairs stay together
    assert not hasattr(model, "norm_f") and "layers.3.norm.weight" in model.unneeded


def test_pyramid_takes_published_synchronised_norms():
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(dense())
    assert isinstance(model.fpn1[1], torch.nn.SyncBatchNorm)
    dense().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"out_indices": (0, 4)}, "out_indices=(0, 4) must name blocks 0..3"),
        ({"out_indices": ()}, "out_indices=() must name blocks 0..3"),
        ({"out_indices": (1, 1)}, "out_indices=(1, 1) names a block twice"),
        (
            {"out_indices": (1, 2)},
            "one or four out_indices at stride 16, 8 or 4, not of (1, 2) at stride 16",
        ),
        ({"patch_size": 2, "stride": 2}, "not of (0, 1, 2, 3) at stride 2; if_fpn=False gives the maps as they are"),
        ({"last_layer_process": "sum"}, "last_layer_process='sum' is not one of none, add, add & norm"),
        ({"if_cls_token": True}, "multiple values for keyword argument 'if_cls_token'"),
    ],
)
def test_bad_dense_arguments_are_named(kwargs, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        dense(**kwargs)
    assert message in str(caught.value)


@pytest.mark.parametrize("process", ["none", "add", "add & norm"])
def test_dense_in_half_precision(process):
    model = dense(use_residual_as_feature=True, last_layer_process=process).bfloat16()
    assert {m.dtype for m in model(torch.randn(1, 3, 64, 64).bfloat16())} == {torch.bfloat16}
