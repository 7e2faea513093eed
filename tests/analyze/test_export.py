"""Exported files compute what the model computes, at any batch size and any image size, or are not written."""

import errno
import json
import logging
import os
import re
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto
from PIL import Image
from torch import nn

from analyze import export, quick
from analyze.exporting import blocks, files, graph, int8, onnx_file
from analyze.impl import export as impl
from ssm_train.common.decode import Decoder
from ssm_train.common.errors import UserError

SMALL = {
    "vmamba_nano": {"depths": (1,), "dims": 8},
    "vim_nano": {"depth": 1, "embed_dim": 16, "patch_size": 8, "stride": 8},
    "vssd_nano": {"depths": (1, 1), "num_heads": (1, 2), "attn_types": ("mamba2", "standard"), "embed_dim": 8},
}
SMALL["vssd_nano_iccv2025"] = SMALL["vssd_nano"] | {"d_state": (4, 8)}
SMALL["vanilla_vmamba_tiny"] = {"depths": (1, 1), "dims": 8}  # merges patches, of which a side may be odd
SMALL["vmamba_tiny_m2"] = {"depths": (1,), "dims": 8, "ssm_d_state": 4}


def task(name: str, tolerance: float = 1e-4, **kwargs) -> impl.Task:
    """A shrunken model as users run it, and how it is compared."""
    make = partial(timm.create_model, name, num_classes=5, **SMALL[name], **kwargs)
    eager = make().eval()
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
    plain = partial(graph.plain_model, make, eager.state_dict())
    return impl.Task(name, eager, plain, (16, 24), Decoder(), [photograph], tolerance)


# the conversion to ONNX takes seconds a model
MODELS = [pytest.param(n, marks=[] if n in ("vmamba_nano", "vim_nano") else pytest.mark.full) for n in SMALL]


@pytest.mark.parametrize("name", MODELS)
def test_onnx_files_of_both_forms(name, tmp_path):
    """One graph: in standard operators for any runtime, and for our library; other batches and sizes than the traced
    one, odd ones, too. The checker has nothing to say, nor has its inference of shapes."""
    of = task(name)
    proto = onnx_file.convert(blocks.trace(graph.with_operators(of.plain()), of.size))
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    sizes = [(1, 32, 32), (3, 16, 24), (2, 41, 27), (1, 24, 56)]
    batches = {str(size): torch.randn(size[0], 3, *size[1:]) for size in sizes}
    for scan, model in (("portable", proto), ("custom", copy)):
        model = onnx_file.finish(model, scan)
        onnx.checker.check_model(model, full_check=True)
        path = tmp_path / f"{scan}.onnx"
        load = partial(files.load_onnx, custom=scan == "custom")
        _, found = files.write_checked(path, partial(onnx.save_model, model), load, of.eager, batches, 1e-4)
        assert [(d.batch, *d.size) for d in found] == sizes
        assert all(d.largest < 1e-5 and d.same_top1 for d in found), found
        ours = {node.domain for node in model.graph.node} - {""}
        assert ours == (set() if scan == "portable" or "vssd" in name or "m2" in name else {"ssm_ops"})
        if name == "vim_nano" and scan == "custom":
            ours = [node.op_type for node in model.graph.node if node.domain]
            assert sorted(ours) == ["BidirectionalScan", "CausalConv1d", "CausalConv1d"]
        session = onnxruntime.InferenceSession(path, files.session_options(True))
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
        assert session.get_outputs()[0].shape == ["batch", 5]
    assert session.get_modelmeta().custom_metadata_map == {"library": "ssm_ops.onnxruntime", "library_version": "1"}


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_openvino_runs_portable_files(name, tmp_path):
    """Whole models, at two sizes and batches."""
    openvino = pytest.importorskip("openvino")
    of, path = task(name), tmp_path / "portable.onnx"
    impl.write_onnx(of, path, "portable")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((1, 3, 16, 24), (3, 3, 41, 27)):
        images = torch.randn(shape)
        with torch.inference_mode():
            expected = of.eager(images)
        torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), expected, rtol=0, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "kwargs", "ours"),
    [
        ("vmamba_nano", {"forward_type": "xv1a"}, {"SS2DScan"}),
        ("vmamba_nano", {"forward_type": "xv2a_act_mul"}, {"SelectiveScan"}),
        ("vmamba_nano", {"forward_type": "v052dc"}, {"SelectiveScan"}),
        ("vmamba_nano", {"forward_type": "v052d_noz"}, {"SS2DScan"}),
        ("vssd_nano", {"linear_attn_duality": False}, set()),
    ],
)
def test_other_mixers(name, kwargs, ours, tmp_path):
    """No published size has them, but the models take them: they have the same two forms, for any image size."""
    of, path = task(name, **kwargs), tmp_path / "custom.onnx"
    for scan in onnx_file.SCANS:
        found = impl.write_onnx(of, path, scan).differences
        assert max(d.largest for d in found) < 1e-5 and len({d.size for d in found}) == 3
    assert {node.op_type for node in onnx.load_model(path).graph.node if node.domain} == ours


@pytest.mark.parametrize(
    "name", ["vmamba_nano", *(pytest.param(name, marks=pytest.mark.full) for name in ("vim_nano", "vssd_nano"))]
)
def test_pt2_files_need_none_of_our_operators(name, tmp_path):
    of = task(name)
    program = graph.trace(of.plain(), of.size)
    called = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in called if "ssm_ops" in target] and "aten.conv2d.default" in called
    found = impl.write_pt2(of, tmp_path / "model.pt2").differences
    assert [d.batch for d in found] == [1, 3] and max(d.largest for d in found) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.fixture(scope="module")
def mamba() -> tuple[impl.Task, onnx.ModelProto]:
    """Wide enough for weights that are worth rounding."""
    of = task("vmamba_nano", ssm_ratio=2.0, mlp_ratio=16.0)
    return of, onnx_file.convert(blocks.trace(graph.with_operators(of.plain()), of.size))


@pytest.mark.parametrize(("weights", "worst"), [("float16", 1e-2), ("bfloat16", 1e-1)])
def test_weights_in_16_bits(weights, worst, mamba, tmp_path):
    of, proto = mamba
    path = tmp_path / "half.onnx"
    model = onnx_file.finish(onnx.ModelProto.FromString(proto.SerializeToString()), "custom", weights)
    onnx.checker.check_model(model, full_check=True)
    assert worst == impl.TOLERANCES[weights]
    save, load = partial(onnx.save_model, model), partial(files.load_onnx, custom=True)
    _, found = files.write_checked(path, save, load, of.eager, of.batches(True), worst)
    assert max(d.largest for d in found) > 0
    large = [t for t in model.graph.initializer if np.prod(t.dims) >= 1024]
    assert large and {t.data_type for t in large} == {getattr(TensorProto, weights.upper())}


@pytest.mark.parametrize("scan", onnx_file.SCANS)
def test_int8_leaves_the_scans_in_float(scan, mamba, tmp_path):
    of, proto = mamba
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = impl.calibration_images(impl.calibration_files(tmp_path, of.decoder), of.name, of.size)
    quantise = partial(int8.quantise, images=images)
    model = onnx_file.finish(onnx.ModelProto.FromString(proto.SerializeToString()), scan, quantise=quantise)
    onnx.save_model(model, tmp_path / "int8.onnx")
    (_, difference), *_ = [
        (d.what, d.largest)
        for d in files.compare(files.load_onnx(tmp_path / "int8.onnx", scan == "custom"), of.eager, of.batches(True))
    ]
    assert 0 < difference < 0.2
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        inputs = [made_by.get(name) for name in node.input]
        if node.op_type in ("Conv", "Gemm"):
            assert inputs[:2] == ["DequantizeLinear"] * 2
        if node.op_type in ("Scan", "SS2DScan"):
            assert node.op_type == "Scan" or node.domain == "ssm_ops"
    assert sum(node.op_type in ("Scan", "SS2DScan") for node in model.graph.node) == (2 if scan == "portable" else 1)


def test_int8_leaves_products_of_activations_in_float(tmp_path):
    """Of which VSSD's mixer and its attention are made, two each."""
    of = task("vssd_nano")
    model = onnx_file.convert(blocks.trace(graph.with_operators(of.plain()), of.size))
    weights = {tensor.name for tensor in model.graph.initializer}
    before = [node for node in model.graph.node if node.op_type == "MatMul"]
    images = [images.numpy() for images in torch.randn(3, 1, 3, *of.size)]
    model = onnx_file.finish(model, "custom", quantise=partial(int8.quantise, images=images))
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    quantised = [
        [made_by.get(name) == "DequantizeLinear" for name in node.input]
        for node in model.graph.node
        if node.op_type == "MatMul"
    ]
    assert quantised == [[bool(weights.intersection(node.input))] * 2 for node in before]
    assert quantised.count([False, False]) == 4 and quantised.count([True, True]) > 4


DEEP = {
    "vmamba_nano": {"depths": (2, 3), "dims": 8},
    "vim_nano": {"depth": 4, "embed_dim": 16, "patch_size": 8, "stride": 8},
    "vssd_nano": {"depths": (2, 2), "num_heads": (1, 2), "attn_types": ("mamba2", "standard"), "embed_dim": 8},
}
# nodes of the file at most, and how many blocks there are of each kind
SIZES_OF_GRAPHS = {"vmamba_nano": (170, [2, 3]), "vim_nano": (170, [3]), "vssd_nano": (240, [2, 2])}


@pytest.mark.parametrize(
    "name", ["vim_nano", *(pytest.param(name, marks=pytest.mark.full) for name in ("vmamba_nano", "vssd_nano"))]
)
def test_a_block_is_traced_once_for_all_of_its_kind(name, tmp_path, monkeypatch):
    """Traces take most of an export, so their number and size do, too, which do not grow with the depth."""
    monkeypatch.setitem(SMALL, name, DEEP[name])
    of, traced = task(name), []
    export_it = graph.export
    monkeypatch.setattr(graph, "export", lambda *given, **how: traced.append(export_it(*given, **how)) or traced[-1])
    outline = blocks.trace(graph.with_operators(of.plain()), of.size)
    most, kinds = SIZES_OF_GRAPHS[name]
    assert len(traced) == 1 and [len(kind.paths) for kind in outline.kinds] == kinds
    calls = [str(node.target) for node in traced[0].graph.nodes if node.op == "call_function"]
    assert calls.count("analyze.block.default") == sum(kinds)
    model = onnx_file.finish(onnx_file.convert(outline), "custom")
    assert len(model.graph.node) <= most and not any(node.metadata_props for node in model.graph.node)
    write, load = partial(onnx.save_model, model), partial(files.load_onnx, custom=True)
    _, found = files.write_checked(tmp_path / "deep.onnx", write, load, of.eager, of.batches(True), 1e-4)
    assert max(d.largest for d in found) < 1e-5


@pytest.mark.full
def test_blocks_that_differ_in_more_than_weights_are_of_several_kinds():
    model = timm.create_model("vmamba_nano", num_classes=5, exportable=True, **DEEP["vmamba_nano"]).eval()
    model.layers[1].blocks[2].op.out_norm.eps = 0.5
    outline = blocks.trace(graph.with_operators(model), (16, 24))
    assert [kind.paths for kind in outline.kinds] == [[f"layers.{i}.blocks.{j}" for j in (0, 1)] for i in (0, 1)]


def test_images_to_calibrate_with_are_evenly_spread(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        impl.calibration_files(tmp_path, Decoder())
    for number in range(100):
        (tmp_path / f"{number:02}.png").touch()
    taken = [int(path.stem) for path in impl.calibration_files(tmp_path, Decoder()).paths]
    assert len(taken) == len(set(taken)) == 64 and (taken[0], taken[32], taken[-1]) == (0, 50, 98)


@pytest.mark.parametrize("opset", [12, 99])
def test_operators_of_another_time(opset):
    with pytest.raises(UserError, match=f"--opset {opset} is not from 18 to 20"):
        onnx_file.convert(None, opset)


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
    batches = {"noise": torch.randn(3, 3, 4, 4)}

    def export_it(shift: float) -> list[files.Difference]:
        write = partial(files.save_program, graph.trace(Shifted(shift), (4, 4)))
        return files.write_checked(path, write, files.load_pt2, Shifted(0), batches, 1e-4)[1]

    with pytest.raises(UserError, match="is not written: on noise its logits differ .* by (0.0002|nan), more than"):
        export_it(shift)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"] and path.read_text() == "of another day"
    assert export_it(5e-5)[0].largest == pytest.approx(5e-5, rel=0.01)


def test_command(tmp_path, capsys, monkeypatch):
    """The report says how images become input: by its numbers the file gives the model's logits for a picture."""
    monkeypatch.setattr(impl.inputs, "load_model", lambda name, checkpoint, which, allow_nonfinite: TINY)
    TINY.num_classes = 2
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7), dtype=np.uint8))  # grey
    photo.save(tmp_path / "grey.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    out = tmp_path / "deep" / "tiny.pt2"
    line = ["--model", "vmamba_nano", "--size", "8", "6", "--images", str(tmp_path / "grey.png"), "--out", str(out)]
    assert export.main([*line, "--classes", str(tmp_path / "names.txt")]) == 0
    report = json.loads((tmp_path / "deep" / "tiny.pt2.json").read_text())
    assert [(d["what"], d["batch"], d["largest"]) for d in report["differences"]] == [
        (f"{what}, batch {count}", count, 0) for what, count in (("noise", 1), ("images", 3))
    ]
    settings = report["preprocessing"]
    assert report["class_names"] == ["cat", "dog"]
    assert (settings["crop_ratio"], settings["interpolation"]) == (0.875, "bicubic")
    pixels = np.asarray(photo.convert("RGB").resize((6, 8), Image.Resampling.BICUBIC)) / 255
    image = torch.tensor((pixels - settings["mean"]) / settings["std"]).permute(2, 0, 1).float()
    batches = impl.check_batches((8, 6), "vmamba_nano", [photo.convert("RGB")])
    torch.testing.assert_close(batches["images, batch 3"], image.expand(3, -1, -1, -1))
    said = capsys.readouterr().out
    assert said.endswith(f"{out}\n{out}.json\n") and "the file" in said and "images/s" in said and "exported in" in said


TINY = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vmamba_nanoo"], "did you mean vmamba_nano"),
        (["--model", "vim_nano", "--size", "3"], "vim_nano takes no images of 3x3 pixels"),
        (["--model", "vim_nano", "--size", "32", "32", "32"], "--size 32 32 32 is not H or H W"),
        (["--model", "vim_nano", "--out", "vim.trt"], "--out vim.trt does not end in .onnx, .aoti.pt2 or .pt2"),
        (["--model", "vim_nano", "--out", "/dev/null/vim.onnx"], "/dev/null is no folder that can be written to"),
        (["--model", "vim_nano", "--images", "nowhere"], "nowhere does not exist"),
        (["--model", "vim_nano", "--checkpoint", "nowhere"], "--checkpoint nowhere is neither a file"),
        (["--model", "vim_nano", "--int8", "nowhere", "--out", "v.onnx"], "nowhere does not exist"),
        (["--model", "vim_nano", "--int8", ".", "--out", "v.pt2"], "--weights and --int8 are for .onnx files"),
        (["--model", "vim_nano", "--opset", "12", "--out", "v.onnx"], "--opset 12 is not from 18 to 20"),
        (["--model", "vim_nano", "--opset", "18", "--out", "v.pt2"], "--scan and --opset are for .onnx files, not for"),
        (["--model", "vim_nano", "--scan", "custom", "--out", "v.pt2"], "--scan and --opset are for .onnx files"),
        (["--model", "vim_nano", "--out", "v.onnx", "v.onnx"], "--out names v.onnx twice"),
        (["--model", "vim_nano", "--tolerance", "nan"], "--tolerance nan must be at least 0"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(impl.inputs, "load_model", lambda *_: TINY)
    TINY.num_classes = 2


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.usefixtures("tiny")
def test_targets_that_cannot_hold_the_file(capsys, tmp_path, monkeypatch):
    """Nothing half-written is left: not the file, not the JSON beside it, no temporary one."""
    line = ["--model", "vmamba_nano", "--size", "8", "--out"]
    folder = tmp_path / "model.onnx"
    folder.mkdir()
    assert export.main([*line, str(folder)]) == 2
    assert f"--out {folder} is a folder: choose another path" in one_line(capsys)
    report = tmp_path / "other.onnx.json"
    report.mkdir()
    assert export.main([*line, str(tmp_path / "other.onnx")]) == 2
    assert f"--out {report} is a folder: choose another path" in one_line(capsys)
    report.rmdir()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(impl.Path, "write_bytes", full)
    assert export.main([*line, str(tmp_path / "model.pt2")]) == 2
    assert f"--out {tmp_path}/model.pt2 cannot be written: No space left on device: free some" in one_line(capsys)
    assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_packages_that_cannot_be_made(capsys, tmp_path, monkeypatch):
    """No compiler; and no room, which PyTorch's own writer answers by ending the process."""
    line = ["--model", "vmamba_nano", "--size", "8", "--out", str(tmp_path / "model.aoti.pt2")]

    def compile_it(program, package_path):
        if reason is not None:
            raise RuntimeError(reason)
        Path(package_path).write_bytes(b"machine code")

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_it)
    reason = "InductorError:\n  no compiler\n  was found"
    assert export.main(line) == 2
    assert "not compile the model (InductorError: no compiler was found); it needs a C++ compiler" in one_line(capsys)
    reason = None
    monkeypatch.setattr(files.shutil, "copyfile", full)
    assert export.main(line) == 2
    assert f"--out {tmp_path}/model.aoti.pt2 cannot be written: No space left on device" in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_calibration_and_accuracy_without_images(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    line = ["--model", "vmamba_nano", "--size", "8", "--out", str(tmp_path / "model.onnx")]
    assert export.main([*line, "--int8", str(tmp_path / "empty")]) == 2
    assert f"{tmp_path}/empty holds no images" in one_line(capsys)
    assert export.main([*line, "--data-path", str(tmp_path / "empty")]) == 2
    assert "empty" in one_line(capsys)
    assert export.main(["--model", "vmamba_nano", "--size", "8", "9", "--data-path", str(tmp_path)]) == 2
    assert "--data-path is evaluated on squares, not on --size 8 9" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.usefixtures("tiny")
def test_images_to_calibrate_with_that_cannot_be_read(capsys, caplog, tmp_path, monkeypatch):
    """They are named and left out, and the exit status says so; where none is left it ends before the work."""
    folder, out = tmp_path / "images", tmp_path / "model.onnx"
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "good.png")
    (folder / "broken.png").write_text("no picture")
    line = ["--model", "vmamba_nano", "--size", "8", "--int8", str(folder), "--out", str(out)]
    assert export.main(line) == 1 and out.stat().st_size > 1000
    assert capsys.readouterr().err.count("broken.png cannot be read as an image") == 1
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    for path in (out, folder / "good.png", tmp_path / "model.onnx.json"):
        path.unlink()
    monkeypatch.setattr(impl.blocks, "trace", lambda *_: pytest.fail("the work has begun"))
    assert export.main(line) == 2
    assert "error: none of the 1 images is readable, e.g. " in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("message", ["the library is not built: pip", "the library has version 7, not 1: pip"])
def test_without_the_library_or_with_another_one(message, capsys, tmp_path, monkeypatch):
    """What the errors say: tests/kernels/test_onnxruntime.py."""

    def no_library():
        raise RuntimeError(message)

    monkeypatch.setattr(files.ssm_ops.onnxruntime, "library_path", no_library)
    out = tmp_path / "model.onnx"
    assert export.main(["--model", "vmamba_nano", "--size", "8", "--scan", "custom", "--out", str(out)]) == 2
    assert one_line(capsys) == f"error: {message}\n" and list(tmp_path.iterdir()) == []


def test_int8_is_as_accurate_on_digits(quickstart, tmp_path, capsys, monkeypatch):
    """Within 0.3 points of the model, that is one image of 355; and what the command says of both."""
    monkeypatch.chdir(quickstart)
    out = tmp_path / "int8.onnx"
    digits = str(quick.DIGITS)
    line = ["--checkpoint", str(quick.QUICKSTART), "--int8", f"{digits}/train", "--data-path", digits]
    assert export.main([*line, "--scan", "custom", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    top1 = json.loads((tmp_path / "int8.onnx.json").read_text())["top1"]
    assert top1["the file in float32"] == top1["eager"] > 50
    assert abs(top1["the file"] - top1["eager"]) <= 0.3
    for who, value in top1.items():
        assert re.search(rf"^{who} +top-1 {value:.2f}% of 355 images, [0-9.]+ images/s$", said, re.MULTILINE)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])
def test_torchscript_of_exportable_models(name, tmp_path):
    model = timm.create_model(name, num_classes=5, exportable=True, **SMALL[name]).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        torch.jit.trace(model, images).save(tmp_path / "model.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano", "vssd_nano_iccv2025", "vmamba_tiny_m2"])
def test_onnx_by_the_converter_of_traces(name, tmp_path):
    """The older one of PyTorch, which knows fewer operators."""
    model = timm.create_model(name, num_classes=5, exportable=True, **SMALL[name]).eval()
    images, out = torch.randn(1, 3, 16, 24), tmp_path / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says what it fixes
        torch.onnx.export(model, (images,), out, dynamo=False, opset_version=17)
        session = onnxruntime.InferenceSession(out)
        [found] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=0, atol=1e-5)
