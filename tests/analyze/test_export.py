"""Exported files compute what the model computes, at any batch size, or are not written."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.layers import set_exportable
from torch import nn

from analyze import export
from ssm_train.common.errors import UserError

SMALL = {
    "vmamba_nano": {"depths": (1,), "dims": 8},
    "vim_nano": {"depth": 1, "embed_dim": 16, "patch_size": 8, "stride": 8},
    "vssd_nano": {"depths": (1, 1), "num_heads": (1, 2), "attn_types": ("mamba2", "standard"), "embed_dim": 8},
}
SMALL["vssd_nano_iccv2025"] = SMALL["vssd_nano"] | {"d_state": (4, 8)}


def make(name: str) -> tuple[nn.Module, nn.Module]:
    """A shrunken model as users run it, and the same made for export."""
    eager = timm.create_model(name, num_classes=5, **SMALL[name]).eval()
    with set_exportable(True):
        plain = timm.create_model(name, num_classes=5, **SMALL[name]).eval()
    plain.load_state_dict(eager.state_dict())
    return eager, plain


# the conversion to ONNX takes ten seconds a model
FILES = [
    pytest.param(name, suffix, marks=pytest.mark.full if suffix == ".onnx" and name != "vmamba_nano" else [])
    for name in SMALL
    for suffix in export.SUFFIXES
]


@pytest.mark.parametrize("name, suffix", FILES)
def test_files_compute_what_the_model_computes(name, suffix, tmp_path):
    """Not square, batches that were not traced, without our operators; in onnxruntime within 1e-4 of eager."""
    eager, plain = make(name)
    program = export.trace(plain, (16, 8))
    called = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in called if "ssm_ops" in target] and "aten.conv2d.default" in called
    batches = {str(count): torch.randn(count, 3, 16, 8) for count in (1, 3, 5)}
    path = tmp_path / f"model{suffix}"
    found = export.export(program, eager, batches, path, 1e-4)
    assert [difference.batch for difference in found] == [1, 3, 5]
    assert all(difference.largest < 1e-5 and difference.same_top1 for difference in found)
    assert list(tmp_path.iterdir()) == [path]
    if suffix == ".onnx":
        check_onnx(path, eager)


def check_onnx(path, eager):
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 8] and session.get_outputs()[0].shape == ["batch", 5]
    images = torch.randn(4, 3, 16, 8)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = eager(images).numpy()
    assert np.abs(logits - expected).max() < 1e-5 < np.abs(expected).max()


class Shifted(nn.Module):
    """Gives something else when it is traced."""

    def __init__(self, shift: float):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        logits = x.mean((2, 3))
        return logits + self.shift if torch.compiler.is_compiling() else logits


@pytest.mark.parametrize("shift", [2e-4, float("nan")])
def test_refuses_what_differs(shift, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("of another day")
    program = export.trace(Shifted(shift), (4, 4))
    batches = {"noise": torch.randn(3, 3, 4, 4)}
    with pytest.raises(UserError, match="is not written: on noise its logits differ .* by (0.0002|nan), more than"):
        export.export(program, Shifted(shift), batches, path, 1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"] and path.read_text() == "of another day"
    found = export.export(export.trace(Shifted(5e-5), (4, 4)), Shifted(0), batches, path, 1e-4)
    assert found[0].largest == pytest.approx(5e-5, rel=0.01)


def test_command(tmp_path, capsys, monkeypatch):
    """The report says how images become input: by its numbers the file gives the model's logits for a picture."""
    monkeypatch.setattr(export.inputs, "load_model", lambda name, checkpoint, which, allow_nonfinite: TINY)
    TINY.num_classes = 2
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7), dtype=np.uint8))  # grey
    photo.save(tmp_path / "grey.png")
    out = tmp_path / "deep" / "tiny.pt2"
    line = ["--model", "vmamba_nano", "--size", "8", "6", "--images", str(tmp_path / "grey.png"), "--out", str(out)]
    assert export.main(line) == 0
    report = json.loads((tmp_path / "deep" / "tiny.pt2.json").read_text())
    assert [(d["what"], d["batch"], d["largest"]) for d in report["differences"]] == [
        (f"{what}, batch {count}", count, 0) for what in ("noise", "images") for count in (1, 3)
    ]
    settings = report["preprocessing"]
    pixels = np.asarray(photo.convert("RGB").resize((6, 8), Image.Resampling.BICUBIC)) / 255
    image = torch.tensor((pixels - settings["mean"]) / settings["std"]).permute(2, 0, 1).float()
    batches = export.check_batches((8, 6), "vmamba_nano", [photo.convert("RGB")])
    torch.testing.assert_close(batches["images, batch 3"], image.expand(3, -1, -1, -1))
    assert capsys.readouterr().out.endswith(f"{out}\n{out}.json\n")


TINY = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model NAME"),
        (["--model", "vmamba_nanoo"], "did you mean vmamba_nano"),
        (["--model", "vim_nano", "--size", "3"], "vim_nano takes no images of 3x3 pixels"),
        (["--model", "vim_nano", "--size", "32", "32", "32"], "--size 32 32 32 is not H or H W"),
        (["--model", "vim_nano", "--out", "vim.trt"], "--out vim.trt does not end in .onnx or .pt2"),
        (["--model", "vim_nano", "--images", "nowhere"], "nowhere does not exist"),
        (["--model", "vim_nano", "--checkpoint", "nowhere"], "--checkpoint nowhere is neither a file"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
