"""Our operators in ONNX graphs compute what they do in PyTorch: by the library for onnxruntime, and spelled out."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import ssm_ops
import ssm_ops.onnxruntime
from analyze.exporting.onnx_operators import DOMAIN, NODES
from analyze.exporting.portable import as_functions, as_nodes, inline

FORMS = ["portable", "custom"]


def one_node(name: str, tensors: list[torch.Tensor], version: int = ssm_ops.onnxruntime.VERSION, **attributes: int):
    """A model of one of our nodes. Parameters are constants, as in exported files; the rest are inputs of any size."""
    names = NODES[name][0].split()
    fixed = ("dt_weight", "A", "D", "dt_bias", "delta_bias", "weight", "bias")
    node = helper.make_node(name, names, ["y"], "node", domain=DOMAIN, version=version, **attributes)
    shapes = {each: list(t.shape) for each, t in zip(names, tensors, strict=True)}

    def value(each: str, rank: int):
        return helper.make_tensor_value_info(each, TensorProto.FLOAT, [f"{each}_{i}" for i in range(rank)])

    constants = [
        helper.make_tensor(each, TensorProto.FLOAT, t.shape, t.flatten().tolist())
        for each, t in zip(names, tensors, strict=True)
        if each in fixed
    ]
    inputs = [value(each, len(shapes[each])) for each in names if each not in fixed]
    result = value("y", len(shapes[names[0]]))
    graph = helper.make_graph([node], "one", inputs, [result], constants)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    feed = {each: t.numpy() for each, t in zip(names, tensors, strict=True) if each not in fixed}
    return helper.make_model(graph, opset_imports=imports, ir_version=10), feed


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], form: str, threads: int = 2) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if form == "custom":
        ssm_ops.onnxruntime.register(options)
    else:
        as_functions(model)
        model = inline(model)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feed)[0])


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def image_scan_parameters(routes: int, dim: int, n_state: int, rank: int) -> list[torch.Tensor]:
    A, bias = -randn(routes * dim, n_state).exp(), randn(routes * dim)
    return [randn(routes, dim, rank), A, randn(routes * dim) + 1, bias]


SIZES = [  # batch, channels, height, width, states; channels that fill blocks of 16 and others; long and short
    (1, 16, 7, 5, 1),
    (3, 21, 9, 8, 2),
    (2, 32, 3, 2, 16),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "scans"), list(zip(SIZES, ("cross2d", "bidi", "unidi"), strict=True)))
def test_ss2d_scan(size, scans, form):
    batch, dim, height, width, n_state = size
    x, parameters = randn(batch, dim, height, width), image_scan_parameters(4, dim, n_state, 3)
    proj = randn(batch, height, width, 4 * (3 + 2 * n_state))
    columns, backwards = ssm_ops._common.route_bits(scans)
    model, feed = one_node("SS2DScan", [x.permute(0, 2, 3, 1), proj, *parameters], columns=columns, backwards=backwards)
    expected = ssm_ops.ss2d_scan(x, proj, *parameters, scans=scans, impl="reference")
    torch.testing.assert_close(run(model, feed, form), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_bidirectional_scan(size, form):
    batch, dim, height, width, n_state = size
    maps = [randn(batch, height * width, dim), randn(batch, height * width, dim) + 1]
    parameters = image_scan_parameters(2, dim, n_state, 3)
    inputs = [*maps, randn(batch, height * width, 2 * (3 + 2 * n_state)), *parameters]
    model, feed = one_node("BidirectionalScan", inputs)
    expected = ssm_ops.bidirectional_scan(*inputs, impl="reference")
    torch.testing.assert_close(run(model, feed, form), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("groups", "n_state", "softplus"), [(1, 16, True), (3, 2, False)])
def test_selective_scan(groups, n_state, softplus, form):
    batch, dim, length = 2, 36, 67
    u, delta = randn(batch, dim, length), randn(batch, dim, length).abs()
    B, C = randn(batch, groups, n_state, length), randn(batch, groups, n_state, length) + 1
    A, D, bias = -randn(dim, n_state).exp(), randn(dim), randn(dim).abs()
    model, feed = one_node("SelectiveScan", [u, delta, A, B, C, D, bias], softplus=int(softplus))
    expected = ssm_ops.selective_scan(u, delta, A, B, C, D, bias, delta_softplus=softplus, impl="reference")
    torch.testing.assert_close(run(model, feed, form), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("reverse", "silu", "length"), [(False, True, 150), (True, False, 131), (True, True, 2)])
def test_causal_conv1d(reverse, silu, length, form):
    x, weight, bias = randn(3, length, 20), randn(20, 4), randn(20)
    model, feed = one_node("CausalConv1d", [x, weight, bias], silu=int(silu), reverse=int(reverse))
    activation = "silu" if silu else None
    expected = ssm_ops.causal_conv1d(x.mT, weight, bias, activation=activation, reverse=reverse, impl="reference").mT
    torch.testing.assert_close(run(model, feed, form), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_openvino_reads_the_portable_form(size):
    openvino = pytest.importorskip("openvino")
    batch, dim, height, width, n_state = size
    inputs = [randn(batch, height * width, dim), randn(batch, height * width, dim) + 1]
    inputs += [randn(batch, height * width, 2 * (3 + 2 * n_state)), *image_scan_parameters(2, dim, n_state, 3)]
    model, feed = one_node("BidirectionalScan", inputs)
    as_functions(model)
    core = openvino.Core()
    read = core.read_model(inline(model).SerializeToString(), b"")
    y = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)[0]
    expected = ssm_ops.bidirectional_scan(*inputs, impl="reference")
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_threads_and_no_images_are_none():
    inputs = [randn(2, 9, 48), randn(2, 9, 48), randn(2, 9, 2 * 5), *image_scan_parameters(2, 48, 2, 1)]
    results = []
    for threads in (1, 3):
        model, feed = one_node("BidirectionalScan", inputs)
        results.append(run(model, feed, "custom", threads))
    assert torch.equal(*results)
    empty = {name: value[:0] for name, value in feed.items()}
    assert run(one_node("BidirectionalScan", inputs)[0], empty, "custom").shape == (0, 9, 48)


def test_nodes_survive_the_way_over_functions():
    model, _ = one_node("CausalConv1d", [randn(3, 5, 20), randn(20, 4), randn(20)], silu=1, reverse=0)
    before = model.SerializeToString()
    originals = as_functions(model)
    assert model.functions and model.SerializeToString() != before
    assert as_nodes(model, originals).SerializeToString() == before


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_named():
    inputs = [randn(2, 9, 48), randn(2, 9, 48), randn(2, 9, 11), *image_scan_parameters(2, 48, 2, 1)]
    model, feed = one_node("BidirectionalScan", inputs)
    with pytest.raises(Exception, match="ssm_ops::BidirectionalScan: proj does not fit x"):
        run(model, feed, "custom")
    model, feed = one_node("CausalConv1d", [randn(3, 5, 20), randn(21, 4), randn(20)], silu=1, reverse=0)
    with pytest.raises(Exception, match="ssm_ops::CausalConv1d: weight and bias do not fit the channels of x"):
        run(model, feed, "custom")


def test_a_file_of_another_version_and_a_session_without_the_library():
    tensors = [randn(3, 5, 20), randn(20, 4), randn(20)]
    model, feed = one_node("CausalConv1d", tensors, version=99, silu=1, reverse=0)
    with pytest.raises(Exception, match="the file needs version 99 of these operators, this library has 1: export"):
        run(model, feed, "custom")
    model, feed = one_node("CausalConv1d", tensors, silu=1, reverse=0)
    with pytest.raises(Exception, match="CausalConv1d"):
        onnxruntime.InferenceSession(model.SerializeToString())


def test_libraries_that_cannot_be_used(tmp_path, monkeypatch):
    module = ssm_ops.onnxruntime
    with monkeypatch.context() as patch:
        patch.setattr(module, "VERSION", 99)
        with pytest.raises(RuntimeError, match="has version 1 of the operators, this package needs 99: SSM_OPS_BUILD"):
            module.library_path()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match=r"broken.so cannot be loaded \(.*: SSM_OPS_BUILD=onnxruntime pip install"):
        module.check(str(broken))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="is not built: SSM_OPS_BUILD=onnxruntime pip install"):
        module.register(onnxruntime.SessionOptions())
