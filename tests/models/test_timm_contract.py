"""What timm and its users expect of every registered model, whatever the family.

Models of full size are built on the meta device, where they cost nothing; what computes does so in `small` ones, of
which every kind of registered model has one.
"""

import copy
import functools
import inspect
import pickle

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import ssm_models
from ssm_models import DenseBackbone
from ssm_models.model_card import registered_models

FAMILIES = {"vssm": ssm_models.vssm, "vssd": ssm_models.vssd, "vim": ssm_models.vim}
NAMES = {
    "vssm": [
        *(f"vanilla_vmamba_{size}" for size in ("base", "small", "tiny")),
        *("vmamba_base_m2", "vmamba_base_s1l20", "vmamba_base_s2l15", "vmamba_nano"),
        *("vmamba_small_m2", "vmamba_small_s1l20", "vmamba_small_s2l15"),
        *("vmamba_tiny_0220", "vmamba_tiny_m2", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"),
    ],
    "vssd": [
        *("vssd_base", "vssd_micro", "vssd_nano", "vssd_nano_iccv2025"),
        *("vssd_small", "vssd_small_iccv2025", "vssd_tiny", "vssd_tiny_iccv2025"),
    ],
    "vim": [
        *("vim_base_patch16_224", "vim_nano", "vim_small_patch16_224", "vim_small_patch16_stride8_224"),
        *("vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224"),
    ],
}
MODELS = [name for names in NAMES.values() for name in names]
NANOS = ["vmamba_nano", "vssd_nano", "vssd_nano_iccv2025", "vim_nano"]
# Of every kind one; the others differ by widths and depths, which `small` replaces.
KINDS = [*NANOS, "vanilla_vmamba_tiny", "vmamba_tiny_m2", "vssd_tiny", "vssd_tiny_iccv2025"]
KINDS += ["vim_tiny_patch16_stride8_224"]
SMALL = {
    "vssm": {"depths": (1, 2), "dims": (16, 24)},
    "vssd": {
        "depths": (1, 2),
        "embed_dim": 16,
        "num_heads": (1, 2),
        "d_state": 8,
        "attn_types": ("mamba2", "standard"),
    },
    "vim": {"depth": 2, "embed_dim": 32},
}
# Where the layers differ from those of the registered models.
OPTIONS = [
    ("vmamba_nano", {"forward_type": "xv2a", "norm_layer": "bn", "downsample_version": "v1"}),
    ("vmamba_nano", {"forward_type": "xv3a_ocov2", "norm_layer": "ln", "ssm_init": "v1"}),
    ("vmamba_nano", {"forward_type": "m0", "ssm_initial_state": True, "posembed": True, "imgsize": 32, "gmlp": True}),
    ("vmamba_nano", {"forward_type": "v05_oncnorm_oact", "ssm_init": "v2", "patchembed_version": "v1"}),
    ("vssd_nano", {"simple_patch_embed": True, "simple_downsample": True, "linear_attn_duality": False}),
    ("vim_nano", {"rms_norm": False, "if_rope": True, "init_layer_scale": 0.1, "cls_mode": "double"}),
    ("vim_nano", {"bimamba_type": "v1", "if_cls_token": False, "if_abs_pos_embed": False, "if_rope": True}),
    ("vim_nano", {"bimamba_type": "none"}),
]
EVERYTHING = [*((name, {}) for name in KINDS), *OPTIONS]
POOLS = ["avg", "max", "avgmax", "catavgmax"]

# What timm's own models do, or most of them, and these do not.
EXCEPTIONS = {
    "torch.fx.symbolic_trace": "operators check shapes in Python, which a symbolic trace cannot; torch.export can, and "
    "with blocks as leaves it does for all but Vim, see test_torch_tools.py",
    "torch.jit.script": "operators dispatch to compiled libraries in Python; torch.jit.trace and torch.export serve",
    "feature_cls='list' and 'dict'": "they rebuild a model from its direct children, and a stage's map is inside one",
    "feature_cls='fx' of Vim": "is torch.fx.symbolic_trace with blocks as leaves",
}


def family_of(name: str) -> str:
    return next(family for family, names in NAMES.items() if name in names)


def small(name: str, **kwargs) -> nn.Module:
    """A registered model, shrunk so that a test on it is quick."""
    return timm.create_model(name, **({"num_classes": 5} | SMALL[family_of(name)] | kwargs))


@functools.cache
def shell(name: str) -> nn.Module:
    """A registered model of full size, without memory."""
    return timm.create_model(name, device="meta").eval()


def image(size: tuple[int, int] = (32, 48), channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size)


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def grid(model: nn.Module, info: dict, size: tuple[int, int]) -> tuple[int, int]:
    """Of the map that `info` describes; all sides here are divisible by its stride."""
    if hasattr(model.patch_embed, "grid"):  # patches may overlap
        return model.patch_embed.grid(*size)
    return tuple(side // info["reduction"] for side in size)


# ---- registration ----


def test_registered_names():
    assert {family: sorted(module.VARIANTS) for family, module in FAMILIES.items()} == {
        family: sorted(names) for family, names in NAMES.items()
    }
    assert sorted(registered_models()) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg_and_attributes(name):
    model, cfg = shell(name), shell(name).default_cfg
    assert all(f"{cfg[layer]}.weight" in model.state_dict() for layer in ("classifier", "first_conv"))
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert model.num_classes == cfg["num_classes"] == model.get_classifier().out_features
    assert model.in_chans == cfg["input_size"][0] == model.get_submodule(cfg["first_conv"]).in_channels
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]["num_chs"]
    assert all(dict(model.named_modules())[info["module"]] is not None for info in model.feature_info)
    assert model.global_pool == ("token" if name.startswith("vim") else "avg")
    last = grid(model, model.feature_info[-1], cfg["input_size"][1:])
    assert last == (cfg["pool_size"] or model.grid)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_on_the_meta_device(name):
    model = shell(name)
    assert {t.device.type for t in tensors(model)} == {"meta"}
    channels, height, width = model.default_cfg["input_size"]
    x = torch.empty(2, channels, height, width, device="meta")
    features, maps = model.forward_intermediates(x, indices=2)
    assert model.forward_head(features).shape == (2, model.num_classes)
    for info, found in zip(model.feature_info[-2:], maps, strict=True):
        assert found.shape == (2, info["num_chs"], *grid(model, info, (height, width)))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_layer_group_and_decay_is_left_off_known_ones(name):
    model = shell(name)
    names = [n for n, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
        head = model.default_cfg["classifier"]
        assert groups[len(groups) - 1] == [f"{head}.weight", f"{head}.bias"]
    assert model.no_weight_decay() and model.no_weight_decay() < set(names)


# ---- forward and backward ----


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient(name):
    model = small(name)
    model(image()).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_features_head_and_intermediates_agree(name):
    model, x, size = small(name).eval(), image(), (32, 48)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    shapes = [(2, info["num_chs"], *grid(model, info, size)) for info in model.feature_info]
    assert [tuple(m.shape) for m in maps] == shapes and all(m.is_contiguous() for m in maps)
    first, *others = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    assert others == []
    torch.testing.assert_close(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], maps[-1])
    other_format = "NLC" if name.startswith("vim") else "NHWC"
    for as_map, other in zip(maps, model.forward_intermediates(x, output_fmt=other_format)[1], strict=True):
        torch.testing.assert_close(other.flatten(1, -2), as_map.flatten(2).mT)
    normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(normed.mean((2, 3)), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="output_fmt='NCWH' is not one of NCHW, " + other_format):
        model.forward_intermediates(x, output_fmt="NCWH")


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_features_only(name):
    depth = {"depth": 4} if name.startswith("vim") else {}  # the last three are the default
    model = small(name, features_only=True, **depth).eval()
    maps = model(image((32, 64)))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() and len(maps) == (3 if depth else 2)
    assert model.in_chans == 3
    for m, stride in zip(maps, model.feature_info.reduction(), strict=True):
        assert m.shape[3] == grid(model.model, {"reduction": stride}, (32, 64))[1]
    one = small(name, features_only=True, out_indices=(0,), **depth).eval()
    assert one.feature_info.channels() == [maps[0].shape[1]] == [one(image((37, 53)))[0].shape[1]]
    assert len(one.model.layers) == 1  # the rest is gone
    hooked = small(name, features_only=True, out_indices=(0,), feature_cls="hook", **depth).eval()
    assert maps[0].shape[1] in hooked(image())[0].shape


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_what_is_kept_and_nothing_else(name):
    model = small(name, drop_path_rate=0.5).train()
    assert not any(getattr(module, "use_checkpoint", False) for module in model.modules())
    gradients, kept = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sizes = []
        torch.manual_seed(3)  # drop path
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = model(image()).square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes))
    assert kept[1] < 0.8 * kept[0]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert any(module.use_checkpoint for module in small(name, use_checkpoint=True).modules() if has_switch(module))


def has_switch(module: nn.Module) -> bool:
    return hasattr(module, "use_checkpoint")


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize(
    "bad", [(3, 32, 32), (1, 3, 1, 32, 32), (2, 4, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)], ids=str
)
def test_what_is_no_batch_of_images_is_refused(name, bad):
    models = [small(name), small(name, features_only=True, out_indices=(0,)), DenseBackbone(name)]
    hint = "; x\\[None\\] makes a batch of one image" if len(bad) == 3 else ""
    expected = rf"images must be \(B, 3, H, W\), not \({', '.join(map(str, bad))}\){hint}$"
    for run in (*models, models[0].forward_features, models[0].forward_intermediates):
        with pytest.raises(ValueError, match=expected):
            run(torch.zeros(bad))


@pytest.mark.parametrize("name", KINDS)
def test_other_channels(name):
    model = small(name, in_chans=5)
    assert model.in_chans == 5
    if hasattr(timm.data, "resolve_input_data_config"):  # not in timm's first versions that we take
        config = timm.data.resolve_input_data_config(model)
        assert config["input_size"][0] == len(config["mean"]) == 5
    assert model(image(channels=5)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"images must be \(B, 5, H, W\), not \(2, 3, 32, 48\)$"):
        model(image())


# ---- classifier ----


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pool", [*POOLS, ""])
@torch.no_grad()
def test_poolings(name, pool):
    """Before the classifier is what comes out without one, and `num_features` and `head_hidden_size` count it."""
    model, x = small(name).eval(), image()
    model.reset_classifier(3, pool)
    assert model.global_pool == pool and model.num_classes == 3
    features, logits = model.forward_features(x), model(x)
    before = model.forward_head(features, pre_logits=True)
    built = small(name, num_classes=3, global_pool=pool).eval()
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(x), logits)
    assert built.head_hidden_size == model.head_hidden_size

    if not (name.startswith("vim") and pool == "max"):  # which pools logits, as published
        torch.testing.assert_close(model.get_classifier()(first_row(model, before)), first_row(model, logits))
    model.reset_classifier(0)
    assert model.num_classes == 0 and model.global_pool == pool
    torch.testing.assert_close(model(x), before)
    if pool == "":
        assert before.shape == features.shape
        assert logits.numel() == 3 * features.numel() // model.num_features
    else:
        assert before.shape == (2, model.head_hidden_size) and logits.shape == (2, 3)
    assert model.head_hidden_size == model.num_features * (2 if pool == "catavgmax" else 1)
    assert small(name, num_classes=0, global_pool=pool)(x).shape == before.shape


def first_row(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(B, channels): of pooled features themselves, of others the first token's or pixel's."""
    if x.dim() == 2:
        return x
    return x[:, :, 0, 0] if getattr(model, "output_fmt", "") == "NCHW" else x.flatten(1, -2)[:, 0]


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_pooled_values(name):
    model, x = small(name).eval(), image()
    model.reset_classifier(0, "")
    rows = model(x)
    if name.startswith("vim"):
        middle = (rows.shape[1] - 1) // 2
        rows = torch.cat([rows[:, :middle], rows[:, middle + 1 :]], 1)  # without the class token
    else:
        rows = (rows if model.output_fmt == "NHWC" else rows.permute(0, 2, 3, 1)).flatten(1, 2)
    mean, top = rows.mean(1), rows.amax(1)
    wanted = {"avg": mean, "max": top, "avgmax": 0.5 * (mean + top), "catavgmax": torch.cat([mean, top], 1)}
    for pool, want in wanted.items():
        model.reset_classifier(0, pool)
        torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("name", NANOS)
def test_an_unknown_pooling_is_refused_before_anything_changes(name):
    model = small(name).eval()
    head, pool = model.get_classifier(), model.global_pool
    with pytest.raises(ValueError, match="'median' is not one of"):
        model.reset_classifier(7, "median")
    assert model.get_classifier() is head and (model.num_classes, model.global_pool) == (5, pool)
    with pytest.raises(ValueError, match="'median' is not one of"):
        small(name, global_pool="median")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pool", [None, "catavgmax"])
def test_a_new_classifier_is_like_the_rest_of_the_model(name, pool):
    model = small(name).bfloat16().eval()
    model.reset_classifier(4, pool)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(m.training for m in model.modules())
    assert model(image().bfloat16()).dtype == torch.bfloat16
    model.train().reset_classifier(0, pool)
    assert all(m.training for m in model.modules())
    shell = small(name, device="meta")
    shell.reset_classifier(4, pool)
    assert {p.device.type for p in shell.parameters()} == {"meta"}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prune", [{}, {"prune_norm": True, "prune_head": False}, {"prune_head": False}], ids=str)
@torch.no_grad()
def test_pruned_models_run(name, prune):
    whole, x = small(name).eval(), image()
    maps = whole.forward_intermediates(x, intermediates_only=True)
    count = len(whole.feature_info)
    for last in range(count):
        model = copy.deepcopy(whole)
        assert model.prune_intermediate_layers([last - count], **prune) == [last] and len(model.layers) == last + 1
        features, [found] = model.forward_intermediates(x, indices=[last])
        torch.testing.assert_close(found, maps[last])
        torch.testing.assert_close(model.forward_features(x), features)
        assert not any(m.training for m in model.modules())
        same_head = not prune.get("prune_head", True) and (last == count - 1 or name.startswith("vim"))
        assert model.num_features == maps[last].shape[1] and model.num_classes == (5 if same_head else 0)
        if same_head:
            assert model(x).shape == (2, 5)
        else:
            assert model(x).shape == features.shape
        half = copy.deepcopy(model).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        model.reset_classifier(4, "avg")
        assert model(x).shape == (2, 4) and model.get_classifier().in_features == model.num_features


# ---- devices, dtypes, initial values ----


@pytest.mark.parametrize(("name", "kwargs"), EVERYTHING, ids=str)
def test_device_and_dtype_reach_every_layer(name, kwargs):
    for dtype in (torch.bfloat16, torch.float64):
        model = small(name, dtype=dtype, device="meta", **kwargs)
        assert {t.device.type for t in tensors(model)} == {"meta"}
        assert {t.dtype for t in tensors(model) if t.is_floating_point()} == {dtype}
    torch.manual_seed(5)
    made = small(name, dtype=torch.float64, **kwargs).eval()
    assert {t.dtype for t in tensors(made) if t.is_floating_point()} == {torch.float64}
    assert made(image().double()).dtype == torch.float64
    assert all(t.isfinite().all() for t in tensors(made))


@pytest.mark.parametrize("name", NANOS)
def test_dense_backbones_take_device_and_dtype(name):
    backbone = DenseBackbone(name, model_args={"device": "meta", "dtype": torch.bfloat16})
    assert {(t.device.type, t.dtype) for t in tensors(backbone) if t.is_floating_point()} == {("meta", torch.bfloat16)}
    backbone.to_empty(device="cpu").init_weights()
    assert all(t.isfinite().all() for t in tensors(backbone))
    assert {m.dtype for m in backbone(image().bfloat16())} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "kwargs"), EVERYTHING, ids=str)
def test_initial_values_after_to_empty(name, kwargs):
    """The same as of a model that was built at once, from the same seed: every parameter and every buffer."""
    torch.manual_seed(5)
    built = small(name, **kwargs).state_dict()
    model = small(name, device="meta", **kwargs).to_empty(device="cpu")
    with torch.no_grad():
        for t in tensors(model):
            t.fill_(float("nan") if t.is_floating_point() else 77)
    torch.manual_seed(5)
    model.init_weights()
    assert built.keys() == model.state_dict().keys()
    different = [key for key, value in model.state_dict().items() if not torch.equal(value, built[key])]
    assert different == []


@pytest.mark.parametrize(("name", "kwargs"), EVERYTHING, ids=str)
def test_modules_reset_what_they_own(name, kwargs):
    """As torch's FSDP expects of every module that has parameters or buffers of its own."""
    for module in small(name, device="meta", **kwargs).to_empty(device="cpu").modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        with torch.no_grad():
            for t in own:
                t.fill_(float("nan") if t.is_floating_point() else 77)
            if own:
                module.reset_parameters()
        assert all(t.isfinite().all() and not (t == 77).any() for t in own), module


# ---- copies, files, compilers ----


@pytest.mark.parametrize(("name", "kwargs"), EVERYTHING, ids=str)
@torch.no_grad()
def test_copies_are_equal(name, kwargs):
    model, x = small(name, **kwargs).eval(), image()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", NANOS)
def test_checkpoint_filter(name):
    """`checkpoint_filter_fn` of the module, by which users find it: weights, or the file around them."""
    model = small(name)
    module = inspect.getmodule(type(model))
    weights = model.state_dict()
    for given in (weights, {"model": weights, "epoch": 3}):
        found = module.checkpoint_filter_fn(given, model)
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(name, training):
    """With drop path and running statistics in training."""
    model, x = small(name, drop_path_rate=0.2).train(training), image((32, 32))
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    if not training:
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NANOS)
def test_exports(name):
    model, x = small(name).eval(), image((32, 32))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces(name):
    model, x = small(name).eval(), image((32, 32))
    torch.testing.assert_close(torch.jit.trace(model, x[:1])(x), model(x))


@pytest.mark.parametrize("name", NANOS)
def test_exportable_models_hold_no_custom_operator(name):
    model = small(name, exportable=True).eval()
    x = image((32, 32))
    exported = torch.export.export(model, (x,))
    assert not [n for n in exported.graph.nodes if "ssm_ops" in str(n.target)]
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_listed_as_an_exception_is_one(name):
    model = small(name).eval()
    tries = {
        "torch.fx.symbolic_trace": [lambda: torch.fx.symbolic_trace(model)],
        "torch.jit.script": [lambda: torch.jit.script(model)],
        "feature_cls='list' and 'dict'": [
            functools.partial(small, name, features_only=True, feature_cls=kind, out_indices=(0,))
            for kind in ("list", "dict")
        ],
        "feature_cls='fx' of Vim": [lambda: small("vim_nano", features_only=True, feature_cls="fx", out_indices=(0,))],
    }
    assert tries.keys() == EXCEPTIONS.keys()
    for attempt in (attempt for attempts in tries.values() for attempt in attempts):
        with pytest.raises((torch.fx.proxy.TraceError, AssertionError, ValueError, RuntimeError)):
            attempt()
