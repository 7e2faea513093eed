"""Averaged copies, wrappers, tracers and counters of PyTorch, timm and torchvision on the models."""

import copy
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.fx.proxy import TraceError
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models.feature_extraction import create_feature_extractor

from tests.models.test_timm_contract import small
from tests.models.test_torch_func import FAMILIES, X, model_of, same

EVERY = pytest.mark.parametrize("name", FAMILIES)
PYRAMIDS = pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("vim")])


@EVERY
def test_averaged_models(name):
    model = model_of(name).train()
    averaged, smooth = AveragedModel(model, use_buffers=False), ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    averaged.update_parameters(model)
    smooth.update(model)
    for mine, of_three, start in zip(
        model.parameters(), smooth.module.parameters(), averaged.module.parameters(), strict=True
    ):
        torch.testing.assert_close(of_three, mine - 0.05)
        torch.testing.assert_close(start, mine)  # the first update copies
    update_bn([X, X], averaged)
    with torch.no_grad():
        assert averaged.eval()(X).isfinite().all() and smooth.module.eval()(X).isfinite().all()
        same([nn.DataParallel(averaged.module)(X)], [averaged.module(X)], 1e-6)


@EVERY
def test_compiled_in_place_and_pickled(name):
    model = model_of(name)
    loaded = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        want = model(X)
        assert torch.equal(loaded(X), want)
        torch._dynamo.reset()
        loaded.compile(fullgraph=True, backend="aot_eager")
        same([loaded(X)], [want], 1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_on_the_cpu(name, dtype):
    model = model_of(name)
    want = copy.deepcopy(model).double()(X.double()).detach()
    with torch.inference_mode():
        got = model.to(dtype)(X.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - want).norm() < {torch.float16: 5e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-12) * want.norm()


@EVERY
def test_weights_for_a_model_without_memory(name):
    source = model_of(name)
    with torch.device("meta"):
        under = small(name, **FAMILIES[name])
    shells = [under, small(name, device="meta", dtype=torch.bfloat16, **FAMILIES[name])]
    for shell in shells:
        loaded = shell.to_empty(device="cpu").eval()
        loaded.load_state_dict(source.state_dict())
        dtype = next(loaded.parameters()).dtype
        with torch.no_grad():
            difference = (loaded(X.to(dtype)).float() - source(X)).norm() / source(X).norm()
        assert difference < (1e-6 if dtype == torch.float32 else 3e-2)
    skipped = torch.nn.utils.skip_init(type(source), num_classes=3)
    assert skipped.get_classifier().out_features == 3
    weights = source.state_dict()
    del weights[next(iter(weights))]
    found = source.load_state_dict(weights | {"more": torch.zeros(1)}, strict=False)
    assert len(found.missing_keys) == 1 and found.unexpected_keys == ["more"]


# ---- torch.fx ----


@PYRAMIDS
@torch.no_grad()
def test_torch_fx_with_blocks_as_leaves(name):
    model = model_of(name)
    nodes = ["layers.0.blocks", "layers.0.downsample"]
    leaves = {"leaf_modules": timm.layers.get_notrace_modules()}
    for extractor in (
        timm.layers.create_feature_extractor(model, nodes),
        create_feature_extractor(model, nodes, tracer_kwargs=leaves),
    ):
        found = extractor(X)
        want = model.forward_intermediates(X, output_fmt=model.output_fmt, intermediates_only=True)
        torch.testing.assert_close(found["layers.0.blocks"], want[0])
    maps = small(name, features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    for info, map_ in zip(maps.feature_info.get_dicts(), maps(X), strict=True):
        assert info["num_chs"] in map_.shape


@EVERY
def test_torch_fx_without_leaves_is_refused(name):
    message = (
        "torch.fx cannot trace VisionMamba" if name == "vim_nano" else "torch.fx cannot look into the blocks: take"
    )
    for trace in (torch.fx.symbolic_trace, lambda model: create_feature_extractor(model, ["layers.0"])):
        with pytest.raises(TraceError, match=message):
            trace(model_of(name))
