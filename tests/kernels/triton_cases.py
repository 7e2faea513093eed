"""Tests of the Triton kernels beyond those of every implementation: many blocks and tiles, every alignment, opcheck.

Not collected by name. They run under Triton's interpreter, started by test_triton.py, and on a GPU, by test_gpu.py.
"""

import itertools

import pytest
import torch

from ssm_ops import cross_merge, cross_scan, selective_scan
from ssm_ops._library import OPERATORS, resolve
from ssm_ops.selective_scan import api as scan_api
from tests.kernels.common import rms_error, scan_inputs, to_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (batch, dim, length, state, options): several blocks of channels, the last one broken; lengths of every alignment,
# among them whole tiles, and one tile that is not full
SCANS = {
    "blocks_aligned": (2, 40, 136, 1, {"groups": 2}),
    "blocks_by_4": (1, 22, 140, 2, {"z": True}),
    "blocks_by_2": (1, 20, 130, 1, {"D": False}),
    "blocks_odd": (1, 20, 129, 1, {"bias": False}),
    "short_aligned": (1, 20, 64, 3, {"z": True}),
    "short_odd": (2, 36, 49, 1, {}),
    "one_tile": (1, 6, 128, 1, {"groups": 2}),
}

FLAGS = list(itertools.product((True, False), (True, False), (True, False), ("cross2d",)))


def run(inputs, dout, impl):
    out, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True, impl=impl)
    out.backward(dout.to(out.dtype))
    return {"out": out, "last_state": last} | {f"d{n}": x.grad for n, x in inputs.items() if x is not None}


def on_device(inputs):
    return {n: x if x is None else x.to(DEVICE) for n, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCANS.values(), ids=SCANS.keys())
def test_blocks_and_tiles_of_the_scan(case, dtype):
    """As exact as the reference in the same dtype, both against float64 on the same numbers."""
    *sizes, options = case
    rounded = {
        n: x if x is None else x.to(dtype).double() for n, x in on_device(scan_inputs(*sizes, **options)).items()
    }
    dout = torch.randn(rounded["u"].shape).to(DEVICE, dtype).double()
    want = run(to_dtype(rounded, torch.float64), dout, "reference")
    reference, got = (run(to_dtype(rounded, dtype), dout, impl) for impl in ("reference", "triton"))
    for key, value in got.items():
        assert value.dtype == reference[key].dtype and value.shape == reference[key].shape
        assert rms_error(value, want[key]) <= 1.1 * rms_error(reference[key], want[key]) + 1e-6, key


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 5, 33), (0, 4, 9, 2)], ids=str)
def test_extreme_sizes_of_the_scan(sizes):
    inputs = on_device(scan_inputs(*sizes))
    dout = torch.randn(inputs["u"].shape, dtype=torch.float64, device=DEVICE)
    want = run(to_dtype(inputs, torch.float64), dout, "reference")
    for key, value in run(to_dtype(inputs, torch.float32), dout, "triton").items():
        assert rms_error(value, want[key]) < 2e-6, key


def test_slices_of_a_larger_tensor():
    """B and C as a model has them: parts of one projection, not aligned to 16 bytes."""
    inputs = to_dtype(on_device(scan_inputs(2, 8, 36, 2, groups=2)), torch.bfloat16)
    whole = torch.randn(2, 2, 3 + 2 + 2, 36, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    grads = {}
    for impl in ("reference", "triton"):
        _, inputs["B"], inputs["C"] = whole.split([3, 2, 2], dim=2)
        out = selective_scan(**inputs, delta_softplus=True, impl=impl)
        grads[impl] = [out, *torch.autograd.grad(out.float().square().sum(), [whole, inputs["u"], inputs["delta"]])]
    for got, want in zip(grads["triton"], grads["reference"], strict=True):
        assert rms_error(got, want) < 1e-2


def assert_same_scan_and_merge(size, dtype, flags):
    """The same bits as the reference: both sum in float32, in the same order."""
    batch, channels, height, width = size
    four = (4,) if flags[2] else ()
    x = torch.randn((batch, *four, channels, height, width) if flags[0] else (batch, height, width, *four, channels))
    y = torch.randn((batch, 4, channels, height, width) if flags[1] else (batch, height, width, 4, channels))
    x, y = x.to(DEVICE, dtype), y.to(DEVICE, dtype)
    assert torch.equal(cross_scan(x, *flags, impl="triton"), cross_scan(x, *flags, impl="reference"))
    assert torch.equal(cross_merge(y, *flags, impl="triton"), cross_merge(y, *flags, impl="reference"))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("size", [(1, 5, 9, 6), (2, 4, 4, 8)], ids=["broken_edges", "whole_tiles"])
def test_many_small_tiles_of_scan_and_merge(size, flags, monkeypatch):
    module = OPERATORS["cross_scan"].find("triton").load()
    monkeypatch.setattr(module, "_blocks", lambda *_: (2, 4, 4))
    assert_same_scan_and_merge(size, torch.float32, flags)


@pytest.mark.parametrize("flags", [f for f in FLAGS if not f[2]], ids=str)
@pytest.mark.parametrize("size", [(1, 24, 72, 16), (1, 34, 5, 67)], ids=["aligned", "odd"])
def test_whole_size_tiles_of_scan_and_merge(size, flags):
    assert_same_scan_and_merge(size, torch.bfloat16, flags)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("operator", [cross_scan, cross_merge])
def test_any_strides_of_scan_and_merge(operator, first):
    """Channels last in memory though first by name, and the other way round; slices, transposed and repeated maps."""
    four = (4,) if operator is cross_merge else ()
    shape = (2, *four, 6, 8, 10) if first else (2, 8, 10, *four, 6)
    dims = len(shape)
    orders = (range(dims), reversed(range(dims)), [0, *range(2, dims), 1], [0, dims - 1, *range(1, dims - 1)])
    wide, narrow = list(shape), list(shape)
    wide[-1], narrow[2] = 2 * shape[-1], 1
    views = [torch.randn(wide, device=DEVICE)[..., 1 : shape[-1] + 1], torch.randn(narrow, device=DEVICE).expand(shape)]
    for order in map(list, orders):
        permuted = torch.randn([shape[i] for i in order], device=DEVICE)
        views.append(permuted.permute([order.index(i) for i in range(dims)]))
    for view in views:
        got, want = (operator(view, first, first, impl=impl) for impl in ("triton", "reference"))
        assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_keeps_no_states(dtype):
    """The kernel has no memory for them; the bits are those of training."""
    given = to_dtype(on_device(scan_inputs(1, 6, 260, 2, groups=2, z=True)), dtype)
    want = selective_scan(**given, delta_softplus=True, return_last_state=True, impl="triton")
    args = [given[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    with torch.no_grad():
        got = selective_scan(**given, delta_softplus=True, return_last_state=True, impl="triton")
        *_, states = scan_api.selective_scan_fwd(*args, True, dtype, False, "triton")
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)) and states.shape == (0,)
        with pytest.raises(ValueError, match=r"the backward needs states \(4, 1, 2, 2, 3\), got \(0,\)"):
            scan_api.selective_scan_bwd(want[0], *args, states, True, "triton")


def test_opcheck():
    i = {
        n: x if x is None else x.detach()
        for n, x in to_dtype(on_device(scan_inputs(1, 4, 9, 2)), torch.float32).items()
    }
    args = (i["u"], i["delta"], i["A"], i["B"], i["C"], i["D"], i["z"], i["delta_bias"])
    torch.library.opcheck(scan_api.selective_scan_fwd, (*args, True, torch.float32, False, "triton"))
    out, _, states = scan_api.selective_scan_fwd(*args, True, torch.float32, True, "triton")
    torch.library.opcheck(scan_api.selective_scan_bwd, (torch.randn_like(out), *args, states, True, "triton"))
    flags = (True, False, False, "cross2d", "triton")
    torch.library.opcheck(torch.ops.ssm_ops.cross_scan.default, (torch.randn(1, 3, 4, 5, device=DEVICE), *flags))
    torch.library.opcheck(torch.ops.ssm_ops.cross_merge.default, (torch.randn(1, 4, 5, 4, 3, device=DEVICE), *flags))


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
@pytest.mark.parametrize("operator", ["selective_scan", "cross_scan", "cross_merge"])
def test_auto_never_takes_the_interpreter(operator):
    assert resolve(OPERATORS[operator], "auto", torch.device("cpu"), torch.float32) != "triton"
