"""Weights of kinds and values that no model has: refused by name, or converted where nothing is lost."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file

import ssm_models
from ssm_models import CheckpointError, DenseBackbone, load_checkpoint
from ssm_models.checkpoint import describe_values
from ssm_models.layers.pos_embed import resize_pos_embed
from ssm_train.common.errors import UserError
from ssm_train.step.pretrained import Pretrained, load_pretrained

NAME = "classifier.head.weight"


@pytest.fixture(scope="module")
def weights():
    return timm.create_model("vmamba_nano", num_classes=3, dims=8, depths=[1, 1]).state_dict()


def model() -> torch.nn.Module:
    return timm.create_model("vmamba_nano", num_classes=3, dims=8, depths=[1, 1])


CHANGES = {
    "bool": (lambda w: w > 0, "is torch.bool, not torch.float32"),
    "integers": (lambda w: w.int(), "is torch.int32, not torch.float32"),
    "bytes": (lambda w: w.byte(), "is torch.uint8, not torch.float32"),
    "complex": (lambda w: w.to(torch.complex64), "is torch.complex64, not torch.float32"),
    "float8": (lambda w: w.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, not torch.float32"),
    "nan": (lambda w: w * math.nan, "has 48 values that are not finite in torch.float32"),
    "an infinity": (lambda w: w.index_fill(1, torch.tensor(3), -math.inf), "has 3 values that are not finite"),
    "infinities of both signs": (
        lambda w: torch.cat([w[:, :-2], w[:, :1] + math.inf, w[:, :1] - math.inf], 1),
        "has 6",
    ),
    "too large for float32": (lambda w: w.double() + 1e300, "has 48 values that are not finite in torch.float32"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", CHANGES)
def test_refused_by_name(weights, tmp_path, kind, suffix):
    change, words = CHANGES[kind]
    content, path = {**weights, NAME: change(weights[NAME]).contiguous()}, tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    elif not content[NAME].is_complex():
        save_file(content, path)
    else:
        pytest.skip("safetensors has no complex numbers everywhere")
    target = model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(target, path)
    assert NAME in str(caught.value) and words in str(caught.value), str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items()), "all or nothing"
    if "finite" in words or words == "has 6":
        load_checkpoint(target, path, allow_nonfinite=True)
        assert not target.state_dict()[NAME].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_are_converted(weights, tmp_path, dtype):
    torch.save({name: value.to(dtype) for name, value in weights.items()}, tmp_path / "a.pth")
    target = model()
    load_checkpoint(target, tmp_path / "a.pth")
    assert torch.equal(target.state_dict()[NAME], weights[NAME].to(dtype).float())


def test_large_finite_values_whose_sum_is_not(weights, tmp_path):
    torch.save({**weights, NAME: torch.full_like(weights[NAME], 3e38)}, tmp_path / "a.pth")
    target = model()
    load_checkpoint(target, tmp_path / "a.pth")
    assert (target.state_dict()[NAME] == 3e38).all()


def test_integers_are_converted_where_none_changes():
    wanted = {"count": torch.zeros((), dtype=torch.int64), "small": torch.zeros(2, dtype=torch.uint8)}
    given = {"count": torch.tensor(7, dtype=torch.int32), "small": torch.tensor([0, 255])}
    assert describe_values(given, wanted) == ""
    assert describe_values({**given, "small": torch.tensor([0, 256])}, wanted) == (
        "small has values that torch.uint8 cannot hold"
    )
    assert describe_values({**given, "count": torch.tensor(7.0)}, wanted) == "count is torch.float32, not torch.int64"


def test_dense_backbones_refuse_them_too(tmp_path):
    whole = timm.create_model("vmamba_nano").state_dict()
    name = next(iter(whole))
    torch.save({**whole, name: whole[name] * math.nan}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="are not finite"):
        DenseBackbone("vmamba_nano", checkpoint=tmp_path / "a.pth")


@pytest.mark.parametrize(
    "rows, channels, grid", [((1 << 20) + 1, 256, (2, 2)), (4, 64, (4096, 4096)), (4, 1, (1 << 15,) * 2)]
)
def test_position_embeddings_of_absurd_size(rows, channels, grid):
    """Before anything of that size is made."""
    table = torch.zeros(1, 1, channels).expand(1, rows, channels)
    with pytest.raises(ValueError, match="is not brought to a grid of"):
        resize_pos_embed(table, (rows, 1), grid, (), ())


def test_the_command(cli, fails, weights, tmp_path):
    save_file({**weights, NAME: weights[NAME] * math.nan}, tmp_path / "a.safetensors")
    begin = ("--pretrained", tmp_path / "a.safetensors", "--output", tmp_path / "run")
    fails(*begin, parts=(NAME, "are not finite", "; --allow-nonfinite takes them"))
    fails(
        "--allow-nonfinite", "--output", tmp_path / "run", parts=("--which and --allow-nonfinite go with --pretrained",)
    )
    outcome = cli(*begin, "--eval", "--allow-nonfinite")
    assert outcome.status == 0
    # what came of it is JSON for every reader
    text = (tmp_path / "run/metrics.json").read_text()
    assert "NaN" not in text and '"loss": null' in text


def test_no_command_names_a_flag_that_it_has_not(weights, tmp_path):
    save_file({**weights, NAME: weights[NAME] * math.nan}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        load_pretrained(model(), Pretrained(tmp_path / "a.safetensors"), option="DISTILL.WEIGHTS")
    assert "are not finite" in str(caught.value) and "allow" not in str(caught.value)


def test_which_set_is_taken(cli, fails, weights, tmp_path):
    other = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "model_ema": other}, tmp_path / "both.pth")
    for which, expected in (("model", weights), ("ema", other)):
        still = (
            "--opts",
            "TRAIN.BASE_LR",
            0,
            "TRAIN.WARMUP_LR",
            0,
            "TRAIN.MIN_LR",
            0,
            "TRAIN.EPOCHS",
            1,
            "TRAIN.WARMUP_EPOCHS",
            0,
        )
        run = tmp_path / which
        outcome = cli("--pretrained", tmp_path / "both.pth", "--which", which, "--output", run, *still)
        assert outcome.status == 0, outcome
        found = ssm_models.read_checkpoint(run / "checkpoints/last/model.safetensors")
        torch.testing.assert_close(found[NAME], expected[NAME])
    torch.save(weights, tmp_path / "one.pth")
    fails(
        "--pretrained", tmp_path / "one.pth", "--which", "ema", "--output", tmp_path / "x", parts=("has no model_ema",)
    )
