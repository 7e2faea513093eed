"""Conversion of official files: values and order stay, names become today's, and the account of it is true."""

import hashlib

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from yacs.config import CfgNode

import ssm_models
from analyze import get_ckpt


@pytest.fixture
def call(tmp_path, capsys):
    """Convert `content` and further arguments: (exit status, account or error, path of the result)."""

    def run(content, *arguments, out="out.safetensors"):
        torch.save(content, tmp_path / "in.pth")
        capsys.readouterr()
        status = get_ckpt.main([str(tmp_path / "in.pth"), str(tmp_path / out), *arguments])
        said = capsys.readouterr()
        return status, said.err if status else said.out, tmp_path / out

    return run


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("vmamba_nano", "92 tensors, 379,786 parameters"),
        ("vim_nano", "109 tensors, 252,682 parameters"),
        ("vssd_nano", "134 tensors, 506,072 parameters"),
    ],
)
def test_training_checkpoints(name, numbers, call):
    model = timm.create_model(name)
    state = model.state_dict()
    averaged = {key: value + 1 for key, value in state.items()}
    content = {"model": state, "model_ema": averaged, "config": CfgNode({"A": 1}), "epoch": 3}
    status, said, out = call(content)
    assert status == 0
    lines = [line.split(None, 1) for line in said.splitlines()]
    assert [key for key, _ in lines] == ["read", "sha256", "weights", "family", "model", "numbers", "wrote", "sha256"]
    values = [value for _, value in lines]
    assert values[1] == sha256(out.parent / "in.pth") and values[7] == sha256(out)
    assert values[2:6] == ["model (the file holds model, model_ema)", name.removesuffix("_nano"), name, numbers]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert numbers == f"{len(state)} tensors, {parameters:,} parameters"
    got = load_file(out)
    assert set(got) == set(state) and all(torch.equal(got[key], value) for key, value in state.items())
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert ssm_models.load_checkpoint(timm.create_model(name), out) == (out, "", (), (), (), ())

    status, error, _ = call(content, "--which", "ema")
    assert status == 2 and error == f"error: {out} exists; --overwrite replaces it\n"
    assert all(torch.equal(value, state[key]) for key, value in load_file(out).items())
    assert call(content, "--which", "ema", "--overwrite")[0] == 0
    assert all(torch.equal(value, averaged[key]) for key, value in load_file(out).items())
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.pth", "out.safetensors"]


OLD = ((".norm.", ".ln_1."), (".op.", ".self_attention."), ("classifier.norm.", "norm."), ("classifier.head.", "head."))


def first_publication(name):
    for present, old in OLD:
        name = name.replace(present, old) if "blocks" in name or not present.startswith(".") else name
    return name


def test_names_of_the_first_publication_and_stacked_shapes(call):
    state = timm.create_model("vmamba_nano", num_classes=7).state_dict()
    old = {}
    for name, value in state.items():
        stacked = name.endswith(("x_proj_weight", "dt_projs_weight"))
        old["module." + first_publication(name)] = value.flatten(0, 1) if stacked else value
    assert {"module.layers.0.blocks.0.ln_1.weight", "module.head.bias", "module.norm.weight"} < set(old)
    status, said, out = call({"state_dict": old})
    assert status == 0 and "model    vmamba_nano\n" in said
    got = load_file(out)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in state.items()}
    assert all(torch.equal(got[key], value) for key, value in state.items())


def test_a_detector_gives_its_backbone(call):
    backbone = ssm_models.DenseVSSM(**ssm_models.vssm.VARIANTS["vmamba_nano"], out_indices=(0, 1, 2)).state_dict()
    state = {f"backbone.{first_publication(name)}": value for name, value in backbone.items()}
    status, said, out = call(
        {"state_dict": {**state, "neck.w": torch.ones(1), "rpn_head.w": torch.ones(1)}, "meta": {}}
    )
    assert status == 0 and "left out: 2 tensors beside the backbone\n" in said and "model    vmamba_nano\n" in said
    got = load_file(out)
    assert set(got) == set(backbone) and all(torch.equal(got[key], value) for key, value in backbone.items())


def test_other_weights_keep_their_names_and_shared_or_strided_ones_their_values(call):
    square = torch.arange(4.0).view(2, 2)
    state = {"a": square, "same": square, "turned": square.t()}
    status, said, out = call(state)
    assert status == 0 and "family   unknown\n" in said and "weights  all (the file is a state dict)\n" in said
    got = load_file(out)
    assert set(got) == set(state) and all(torch.equal(got[key], value) for key, value in state.items())
    deeper = timm.create_model("vmamba_nano", depths=(1, 3, 1)).state_dict()
    said = call(deeper, "--overwrite")[1]
    assert "family   vmamba\nmodel    none of the registered ones; names are those of the file\n" in said


def test_a_position_embedding_of_another_grid_is_not_resized(call):
    state = timm.create_model("vim_nano", img_size=64).state_dict()
    status, said, out = call({"model": state})
    assert status == 0 and "family   vim\nmodel    none of" in said
    assert torch.equal(load_file(out)["pos_embed"], state["pos_embed"])


def test_mistakes_are_one_line_and_write_nothing(call, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    weights = {"model": {"a": torch.ones(1)}}
    (tmp_path / "file").touch()
    for content, out, reason in (
        ({**weights, "x": Payload()}, "out.safetensors", "open, and no code is run from files"),
        ({"epoch": 1}, "out.safetensors", "has no model or state_dict or model_ema weights"),
        (weights, "out.pth", "out.pth must end in .safetensors"),
        (weights, "file/out.safetensors", "cannot be written"),
    ):
        status, error, path = call(content, out=out)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and reason in error
        assert not path.exists() and sorted(file.name for file in tmp_path.iterdir()) == ["file", "in.pth"]


def test_inspection_writes_nothing(tmp_path, capsys):
    """Without OUT, the same account; folders of runs are taken as they are."""
    model = timm.create_model("vmamba_nano")
    source = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), source)
    assert get_ckpt.main([str(source)]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["model"] == "vmamba_nano" and told["family"] == "vmamba"
    assert told["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert told["numbers"] == f"{len(model.state_dict())} tensors, 379,786 parameters"
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert get_ckpt.main([str(tmp_path)]) == 2
    assert f"IN {tmp_path} is neither a file nor a folder of a finished run" in capsys.readouterr().err
