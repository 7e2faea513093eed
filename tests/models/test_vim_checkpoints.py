"""Vim's checkpoints of other sizes and forms, and its descriptions from upstream."""

import pytest
import timm
import torch

from ssm_models import DenseVisionMamba, load_checkpoint
from ssm_models.layers.pos_embed import class_token_rows, resize_pos_embed, split_rows
from ssm_models.layers.rope import GridRope
from ssm_models.layers.vim_tokens import CLS_MODES
from ssm_models.upstream.vim import build
from ssm_models.vim import VisionMamba
from tests.models.small_vim import SMALL, small

# ---- checkpoints ----


def test_a_checkpoint_of_another_image_size_loads_and_acts_as_resizing_on_the_way():
    for mode in CLS_MODES:
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


def test_drops_what_of_the_mixers_changes_nothing():
    dead = {"dt_min": 0.01, "dt_max": 0.2, "dt_init": "constant", "dt_scale": 2.0, "dt_init_floor": 1e-3}
    dead |= {"use_fast_path": False, "layer_idx": 0, "device": None, "dtype": None}
    config = SMALL | {"ssm_cfg": {**dead, "d_conv": 3, "dt_rank": 5}}
    model = build(config)
    assert shape_of(model) == shape_of(build(SMALL | {"ssm_cfg": {"d_conv": 3, "dt_rank": 5}}))
    assert model.layers[0].mixer.conv1d.kernel_size == (3,) and model.layers[0].mixer.dt_rank == 5
    assert set(dead) < set(config["ssm_cfg"])  # the caller's own is left as it was


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
