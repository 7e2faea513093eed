"""`from_upstream("vmamba", ...)`: every yaml of the original repository, its former names, and what it overlooks."""

import json

import pytest
import torch

from ssm_models import from_upstream
from ssm_models.layers.forward_type import parse_forward_type, parse_xv
from ssm_models.upstream.vmamba_forward_types import present_forward_type
from ssm_models.upstream.vmamba_variants import FURTHER_VARIANTS
from ssm_models.vssm import VARIANTS
from tests.models.golden import DATA

YAMLS = json.loads((DATA / "yaml_param_counts.json").read_text())
V2 = {"DEPTHS": [2, 2, 8, 2], "SSM_D_STATE": 1, "SSM_RATIO": 1.0, "SSM_CONV": 3, "SSM_CONV_BIAS": False}
V2 |= {"SSM_FORWARDTYPE": "v05_noz", "MLP_RATIO": 4.0, "DOWNSAMPLE": "v3", "PATCHEMBED": "v2", "NORM_LAYER": "ln2d"}
V0 = {"DEPTHS": [2, 2, 9, 2], "SSM_D_STATE": 16, "SSM_RATIO": 2.0, "MLP_RATIO": 0.0, "DOWNSAMPLE": "v1"}
V0 |= {"PATCHEMBED": "v1"}
NO_CONV, FIVE = {"SSM_CONV": -1}, {"DEPTHS": [2, 2, 5, 2]}
A7 = V2 | NO_CONV | {"SSM_D_STATE": 16, "SSM_FORWARDTYPE": "v05"}
SECTIONS = {  # MODEL.VSSM of the ablations, by the end of the file's name
    "a0": V0 | {"SSM_FORWARDTYPE": "v0"},
    "a0seq": V0 | {"SSM_FORWARDTYPE": "v0seq"},
    "a01": V0 | {"SSM_FORWARDTYPE": "v01"},
    "a1": V0 | {"SSM_FORWARDTYPE": "v02"},
    "a2": V0 | {"SSM_FORWARDTYPE": "v04"},
    "a3": V0 | {"SSM_FORWARDTYPE": "v05", "NORM_LAYER": "ln2d"},
    "a7": A7 | {"DEPTHS": [2, 2, 2, 2], "SSM_RATIO": 2.0},
    "a7a": A7 | {"DEPTHS": [2, 2, 2, 2]},
    "a8": A7 | FIVE,
    "a9d": A7 | FIVE | {"SSM_FORWARDTYPE": "v05_noz"},
    "unidi": V2 | {"SSM_FORWARDTYPE": "v051d_noz"},
    "bidi": V2 | {"SSM_FORWARDTYPE": "v052d_noz"},
    "cas2d": V2 | {"SSM_FORWARDTYPE": "v052dc_noz"},
    "unidi_ndw": V2 | NO_CONV | {"SSM_FORWARDTYPE": "v051d_noz"},
    "bidi_ndw": V2 | NO_CONV | {"SSM_FORWARDTYPE": "v052d_noz"},
    "cas2d_ndw": V2 | NO_CONV | {"SSM_FORWARDTYPE": "v052dc_noz"},
    "ds2": V2 | FIVE | {"SSM_D_STATE": 2, "SSM_RATIO": 2.0},
    "ds4": V2 | FIVE | {"SSM_D_STATE": 4, "SSM_RATIO": 2.0},
    "ds8": V2 | FIVE | {"SSM_D_STATE": 8, "SSM_RATIO": 1.5},
    "ds16": V2 | FIVE | {"SSM_D_STATE": 16},
    "sr1l5": V2 | FIVE,
    "sr1hl5": V2 | FIVE | {"SSM_RATIO": 1.5},
    "m2s2h": V2 | {"MLP_RATIO": 2.0, "SSM_RATIO": 2.5},
    "m3s1h": V2 | {"MLP_RATIO": 3.0, "SSM_RATIO": 1.5},
    "init1": V2 | {"SSM_INIT": "v1"},
    "init2": V2 | {"SSM_INIT": "v2"},
    "gelu": V2 | {"SSM_ACT_LAYER": "gelu"},
    "relu": V2 | {"SSM_ACT_LAYER": "relu"},
    "ndw": V2 | NO_CONV,
    "posndw": V2 | NO_CONV | {"POSEMBED": True},
    "ondw": V2 | {"SSM_FORWARDTYPE": "v05_ondwconv3_noz"},
    "onone": V2 | {"SSM_FORWARDTYPE": "v05_onnone_noz"},
    "onsoftmax": V2 | {"SSM_FORWARDTYPE": "v05_onsoftmax_noz"},
}


def build(config, **kwargs):
    with torch.device("meta"):
        return from_upstream("vmamba", config, **kwargs)


def counts(model):
    return sum(p.numel() for p in model.parameters()), len(model.state_dict())


def choices(model):
    """What a model computes beyond the shapes of its weights: the modules, and the options of its mixers."""
    op = model.layers[0].blocks[0].op
    return str(model), {n: v for n, v in vars(op).items() if isinstance(v, (bool, str))}


@pytest.mark.parametrize("file", YAMLS)
def test_every_yaml_by_name(file):
    record = YAMLS[file]
    assert counts(build(file)) == (record["n_params"], record["n_keys"])
    if file.startswith("vssm/"):
        assert counts(build(record["name"])) == (record["n_params"], record["n_keys"])
    else:
        assert (
            FURTHER_VARIANTS[file.removeprefix("vssmab/").removesuffix(".yaml")]["forward_type"]
            == (record["forward_type"])
        )


@pytest.mark.parametrize("file", [file for file in YAMLS if file.startswith("vssmab")])
def test_every_ablation_by_its_model_section(file):
    record = YAMLS[file]
    vssm = SECTIONS[file.removesuffix(".yaml").split("_224_")[1]]
    section = {"TYPE": "vssm", "NAME": record["name"], "DROP_PATH_RATE": 0.2}
    model = build(section | {"VSSM": {"EMBED_DIM": 96, "SSM_DT_RANK": "auto"} | vssm})
    assert counts(model) == (record["n_params"], record["n_keys"])
    assert vssm["SSM_FORWARDTYPE"] == record["forward_type"]
    assert choices(model) == choices(build(file))


def test_every_ablation_is_there():
    ablations = {file.removeprefix("vssmab/").removesuffix(".yaml") for file in YAMLS if file.startswith("vssmab")}
    february = {"vssm1_tiny", "vssm1_small", "vssm1_base", "vssmtiny_dp02"}
    assert len(ablations) == len(SECTIONS) == 33 and set(FURTHER_VARIANTS) == ablations | february
    assert not set(FURTHER_VARIANTS) & set(VARIANTS)


def test_trainings_of_february():
    for name in ("vssmtiny_dp02", "ckpts/vssmtiny_dp02_ckpt_epoch_258.pth"):
        model = build(name)
        assert counts(model)[0] == 32_484_904
    assert model.layers[0].blocks[0].op.gated and not model.channel_first
    # the counts that the authors noted for this one and its relatives, in millions
    yaml = {"EMBED_DIM": 96, "DEPTHS": [2, 2, 4, 2], "SSM_D_STATE": 1, "SSM_RATIO": 2.0, "SSM_SIMPLE_INIT": True}
    for change, millions in (
        ({"SSM_CONV": 3, "DOWNSAMPLE": "v3", "PATCHEMBED": "v2"}, 32.49),
        ({"SSM_CONV": -1, "DOWNSAMPLE": "v3", "PATCHEMBED": "v1"}, 32.38),
        ({"SSM_CONV": -1, "DOWNSAMPLE": "v2", "PATCHEMBED": "v1"}, 30.4),
        ({"SSM_CONV": -1, "DOWNSAMPLE": "v2", "PATCHEMBED": "v1", "MLP_RATIO": 0.0}, 15.5),
    ):
        model = build({"VSSM": yaml | change})
        assert counts(model)[0] == pytest.approx(millions * 1e6, abs=6e3 if millions > 31 else 6e4)

    model = build("vssm1_base")
    assert [len(stage.blocks) for stage in model.layers] == [2, 2, 16, 2] and model.dims[0] == 128
    op = build("vssm1_tiny").layers[0].blocks[0].op
    assert op.gated and op.Ds.numel() == 4 * 115 and op.A_logs.shape[1] == 16 and op.conv2d.bias is not None
    section = {"EMBED_DIM": 96, "DEPTHS": [2, 2, 4, 2], "D_STATE": 16, "DT_RANK": "auto", "SSM_RATIO": 1.2}
    assert counts(build({"VSSM": section | {"MLP_RATIO": 4.0}})) == counts(build("vssm1_tiny"))


def test_files_of_weights_name_their_models():
    assert counts(build("vssm1_tiny_0230s_ckpt_epoch_264.pth"))[0] == 30_249_064
    assert counts(build("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth"))[0] == 88_557_800
    assert counts(build("vssmsmall_dp03_ckpt_epoch_238"))[0] == 44_417_416


@pytest.mark.parametrize(
    "former, present",
    [
        ("v0_seq", "v0seq"),
        ("v1", "v2"),
        ("v1noz", "v2_noz"),
        ("v3noz", "v3_noz"),
        ("v2softmaxnozact", "v2_onsoftmax_nozact"),
        ("v2dwconv3", "v2_ondwconv3"),
        ("v2nonenoz", "v2_onnone_noz"),
        ("v31d_noz", "v051d_noz"),
        ("v32dc_onsigmoid_noz", "v052dc_onsigmoid_noz"),
        ("v31dcnorm", "v051d_oncnorm"),
        ("v31d", "v051d"),
        ("v05_noz", "v05_noz"),
        ("v052dc_noz", "v052dc_noz"),
        ("v04", "v04"),
        ("v4", "v4"),
        ("m0_noz", "m0_noz"),
    ],
)
def test_former_forward_types(former, present):
    assert present_forward_type(former) == present
    if present[0] == "v":
        parse_forward_type(present)


@pytest.mark.parametrize("name", ["v9", "v2wconv3", "share_ssm", "v05_noz_onnone", "v0_noz", "v052d3"])
def test_names_no_version_knew_reach_the_grammar(name):
    with pytest.raises(ValueError, match="is not known. Legal: v0, v0seq, or a base of v01"):
        build({"forward_type": name, "depths": [1], "dims": 16})


def test_former_arguments():
    tiny = {"depths": [1], "dims": 16, "forward_type": "v2noz", "ssm_d_state": 2}
    plain, softmax = build(tiny), build(tiny | {"softmax_version": True})
    assert choices(plain) == choices(build(tiny | {"softmax_version": False, "ssm_simple_init": False}))
    assert choices(softmax) == choices(build(tiny | {"forward_type": "v2_onsoftmax_noz", "softmax_version": True}))
    assert str(plain) != str(softmax) and "SpatialSoftmax" in str(softmax)
    simple = from_upstream("vmamba", tiny | {"ssm_simple_init": True})
    assert simple.layers[0].blocks[0].op.A_logs.std().item() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("name, nearest", [("xv1", "xv1a"), ("xv4", "xv3a_act"), ("xv61", "xv1a_act"), ("xv7", "_mul")])
def test_former_xv_mixers_name_their_relatives(name, nearest):
    with pytest.raises(ValueError, match=rf"forward_type='{name}' was replaced .* the nearest is '.*{nearest}'"):
        build({"forward_type": name})


@pytest.mark.parametrize(
    "name, has_conv, read",
    [
        ("xv1a_act_mul", True, "xv1a_act_mul"),
        ("xv1a_mul_act", True, "xv1a_act"),
        ("xv1a_ocov_ca_act", True, "xv1a_ocov_ca_act"),
        ("xv1a_ocov_cpos", True, "xv1a_cpos"),
        ("xv3a_act_onnone", True, "xv3a_act_onnone"),
        ("xv3a_onnone_act", True, "xv3a_act"),
        ("xv2a_ocov2_ca1_act", False, "xv2a_act"),
        ("xv2a_ca", False, "xv2a"),
        ("xv1a_foo_act", True, "xv1a_foo_act"),
    ],
)
def test_postfixes_of_xv_that_upstream_overlooks(name, has_conv, read):
    assert present_forward_type(name, has_conv) == read
    if "foo" not in name:
        parse_xv(read)


def test_arguments_without_effect_upstream_are_dropped():
    tiny = {"depths": [1], "dims": 16, "ssm_act_layer": "gelu", "ssm_conv": -1}
    assert counts(build(tiny | {"forward_type": "xv1a_ocov"})) == counts(
        build({"depths": [1], "dims": 16, "ssm_conv": -1, "forward_type": "xv1a"})
    )
    assert build(tiny | {"forward_type": "v0"}).layers[0].blocks[0].op.conv2d.bias is not None


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("v05noz", "v05_noz"),
        ("v05nozoact", "v05_noz_oact"),
        ("v3noz", "v3_noz"),
        ("v05softmaxnoz", "v05_onsoftmax_noz"),
    ],
)
def test_postfixes_without_underscores(former, present):
    """Of every base, as files of March 2024 have them."""
    assert present_forward_type(former) == present
    small = {"depths": [1], "dims": 8}
    one, other = (from_upstream("vmamba", {**small, "forward_type": name}) for name in (former, present))
    assert [tuple(p.shape) for p in one.parameters()] == [tuple(p.shape) for p in other.parameters()]


def test_keys_of_detectors_configs():
    """Of a dict in an mm config, `type` is no argument, and `frozen_stages` freezes."""
    arguments = {"type": "MM_VSSM", "depths": [1, 1], "dims": 8, "frozen_stages": 1, "out_indices": (0, 1)}
    model = from_upstream("vmamba", arguments, backbone=True)
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed", "layers", "outnorm0"}
    assert all(p.requires_grad for p in model.layers[1].parameters())
    del arguments["out_indices"]
    assert all(p.requires_grad for p in from_upstream("vmamba", arguments).parameters())


def test_whole_yamls():
    part = {"TYPE": "vssm", "NAME": "x", "IS_PRETRAIN": False, "VSSM": {**V2, "SCAN": "cross"}}
    whole = {"MODEL": part, "DATA": {"IMG_SIZE": 224}}
    assert sum(p.numel() for p in build(whole).parameters()) == sum(p.numel() for p in build(part).parameters())
    with pytest.raises(ValueError, match="this yaml has no MODEL.VSSM, the section .*; it has TYPE, NAME, SWIN"):
        from_upstream("vmamba", {"MODEL": {"TYPE": "swin", "NAME": "swin", "SWIN": {}}})
    with pytest.raises(ValueError, match="has no MODEL.VMAMBA2"):
        from_upstream("vssd", {"TYPE": "vssm", "NAME": "x", "VSSM": {}})
