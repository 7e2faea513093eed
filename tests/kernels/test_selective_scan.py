"""Numbers of the selective scan: against the loop, recorded outputs of the official code, and finite differences."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_ops import selective_scan
from ssm_ops.selective_scan.api import STATE_CHUNK
from tests.kernels.common import implementations, loop_scan, rms_error, scan_inputs, to_dtype

DATA = Path(__file__).parent.parent / "data" / "ops"
RECORDED = json.loads((DATA / "selective_scan.json").read_text())
STORED = sorted(path.stem.removeprefix("selective_scan_") for path in DATA.glob("selective_scan_*.npz"))
FLOAT64 = ("auto", "reference")
IMPL = pytest.mark.parametrize("impl", implementations("selective_scan"))

# (batch, dim, length, state, options); odd sizes, lengths around the chunks of the implementations
CASES = {
    "vmamba_v2": (2, 12, 196, 1, {"groups": 4}),
    "vmamba_v1": (1, 8, 63, 16, {"groups": 4}),
    "vim": (1, 6, 49, 16, {"z": True}),
    "one_token": (2, 4, 1, 3, {}),
    "bare": (2, 3, 7, 2, {"D": False, "bias": False}),
    "grouped_delta": (2, 12, 50, 2, {"groups": 2, "delta_dim": 3, "z": True}),
    "L1024": (1, 4, 1024, 2, {}),
    "L2047": (1, 3, 2047, 1, {}),
    "L2048": (1, 2, 2048, 1, {"groups": 2}),
    "L2049": (1, 3, 2049, 1, {}),
    "L3136": (1, 2, 3136, 1, {}),
    "N256": (1, 2, 33, 256, {}),
}


def run(inputs, dout, impl, softplus=True, out_dtype=None):
    out, last = selective_scan(
        **inputs, delta_softplus=softplus, out_dtype=out_dtype, return_last_state=True, impl=impl
    )
    out.backward(dout.to(out.dtype))
    return {"out": out, "last_state": last} | {f"d{n}": x.grad for n, x in inputs.items() if x is not None}


def oracle(inputs, dout, softplus=True):
    inputs = to_dtype(inputs, torch.float64)
    out, last = loop_scan(**inputs, delta_softplus=softplus)
    out.backward(dout)
    return {"out": out, "last_state": last} | {f"d{n}": x.grad for n, x in inputs.items() if x is not None}


@IMPL
@pytest.mark.parametrize("name", STORED)
def test_recorded_outputs_of_the_official_code(name, impl):
    stored = np.load(DATA / f"selective_scan_{name}.npz")
    inputs = {
        n: torch.from_numpy(stored[n]) for n in ("u", "delta", "A", "B", "C", "D", "delta_bias", "z") if n in stored
    }
    dtype, tolerance = (torch.float64, 1e-12) if impl in FLOAT64 else (torch.float32, 2e-6)
    got = run(to_dtype(inputs, dtype), torch.from_numpy(stored["dout"]), impl, RECORDED[name]["delta_softplus"])
    for key, value in got.items():
        recorded = f"ref_d_{key[1:]}" if key.startswith("d") else f"ref_{key}"
        assert rms_error(value, torch.from_numpy(stored[recorded]).view(value.shape)) < tolerance, key


@functools.cache
def case_and_oracle(name):
    """Inputs, gradient of the output, and what the loop gives, which takes seconds for long sequences."""
    *sizes, options = CASES[name]
    inputs = scan_inputs(*sizes, **options)
    dout = torch.randn(inputs["u"].shape, dtype=torch.float64)
    return inputs, dout, oracle(inputs, dout)


@IMPL
@pytest.mark.parametrize("case", CASES)
def test_float32_against_the_loop(case, impl):
    inputs, dout, want = case_and_oracle(case)
    got = run(to_dtype(inputs, torch.float32), dout, impl)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    for key, value in got.items():
        assert rms_error(value, want[key]) < 2e-6, key  # about 16 float32 roundings


@IMPL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vmamba_v2", "vmamba_v1", "vim", "grouped_delta"])
def test_half_precision_rounds_only_the_results(name, dtype, impl):
    """From the same rounded inputs, a half-precision result differs from the exact one by its own rounding alone."""
    *sizes, options = CASES[name]
    rounded = {n: x if x is None else x.to(dtype).double() for n, x in scan_inputs(*sizes, **options).items()}
    dout = torch.randn(rounded["u"].shape).to(dtype).double()
    want = oracle(rounded, dout)
    for out_dtype in (dtype, torch.float32):
        got = run(to_dtype(rounded, dtype), dout, impl, out_dtype=out_dtype)
        assert got["out"].dtype == out_dtype
        for key, value in got.items():
            is_float32 = value.dtype == torch.float32
            assert is_float32 == (
                key in ("last_state", "dA", "dD", "ddelta_bias") or (key, out_dtype) == ("out", torch.float32)
            )
            assert rms_error(value, want[key]) < (2e-6 if is_float32 else torch.finfo(dtype).eps / 2), key


@IMPL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vmamba_v2", "grouped_delta"])
def test_step_sizes_in_float32_beside_half_precision(name, dtype, impl):
    *sizes, options = CASES[name]
    rounded = {n: x if x is None else x.to(dtype).double() for n, x in scan_inputs(*sizes, **options).items()}
    rounded["delta"] = (rounded["delta"] * 1.001).float().double()  # numbers that half precision does not have
    dout = torch.randn(rounded["u"].shape).to(dtype).double()
    want = oracle(rounded, dout)
    given = to_dtype(rounded, dtype) | {"delta": rounded["delta"].float().requires_grad_()}
    got = run(given, dout, impl, out_dtype=torch.float32)
    assert got["ddelta"].dtype == torch.float32 and got["du"].dtype == got["dB"].dtype == dtype
    for key, value in got.items():
        assert rms_error(value, want[key]) < (2e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps / 2), key


@pytest.mark.parametrize("impl", FLOAT64)
def test_gradients_by_finite_differences(impl):
    inputs = to_dtype(scan_inputs(2, 4, 5, 2, groups=2, delta_dim=2, z=True), torch.float64)
    names = list(inputs)

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), delta_softplus=True, impl=impl)

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@IMPL
def test_large_steps_saturate_the_softplus_and_stay_finite(impl):
    inputs = scan_inputs(1, 3, 40, 2)
    inputs["delta"] = 30 * inputs["delta"]
    dout = torch.randn(inputs["u"].shape, dtype=torch.float64)
    want = oracle(inputs, dout)
    for key, value in run(to_dtype(inputs, torch.float32), dout, impl).items():
        assert rms_error(value, want[key]) < 5e-6, key


@IMPL
def test_any_strides_and_3d_B_and_C(impl):
    inputs = scan_inputs(2, 6, 30, 2, z=True)
    dout = torch.randn(2, 6, 30, dtype=torch.float64).transpose(1, 2).contiguous().transpose(1, 2)
    want = oracle(inputs, dout)
    strided = to_dtype(inputs, torch.float32)
    for name in ("u", "delta", "z", "A"):
        strided[name] = inputs[name].float().mT.contiguous().mT.requires_grad_()
    for name in ("B", "C"):
        strided[name] = inputs[name].float().squeeze(1).mT.contiguous().mT.requires_grad_()
    got = run(strided, dout, impl)
    assert got["out"].is_contiguous()
    for key, value in got.items():
        assert rms_error(value, want[key].reshape(value.shape)) < 2e-6, key


@IMPL
def test_same_call_same_bits(impl):
    inputs = scan_inputs(2, 8, 300, 4, groups=2, z=True)
    dout = torch.randn(2, 8, 300)
    first, second = (run(to_dtype(inputs, torch.float32), dout, impl) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@IMPL
def test_empty_batch(impl):
    got = run(to_dtype(scan_inputs(0, 4, 9, 2, z=True), torch.float32), torch.zeros(0, 4, 9), impl)
    assert got["out"].shape == (0, 4, 9) and got["du"].shape == (0, 4, 9)
    assert torch.equal(got["dA"], torch.zeros(4, 2))


@IMPL
def test_nan_in_nan_out(impl):
    inputs = to_dtype(scan_inputs(1, 2, 20, 2), torch.float32)
    with torch.no_grad():
        inputs["u"][0, 0, 5] = float("nan")
    out = selective_scan(**inputs, delta_softplus=True, impl=impl)
    assert not out[0, 0, :5].isnan().any() and out[0, 0, 5:].isnan().all() and not out[0, 1].isnan().any()


def test_reference_memory_does_not_grow_with_state_times_length():
    """No intermediate is larger than one chunk's states or than an input."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    batch, dim, length, n_state = 1, 4, 4096, 16
    inputs = to_dtype(scan_inputs(batch, dim, length, n_state), torch.float32)
    with Largest() as largest:
        selective_scan(**inputs, delta_softplus=True, impl="reference").sum().backward()
    one_chunk = batch * dim * n_state * STATE_CHUNK["reference"]
    assert largest.numel <= max(one_chunk, batch * max(dim, n_state) * length)
    assert largest.numel < batch * dim * length * n_state


BAD = {
    "u must be (B, D, L)": ({"u": torch.zeros(4, 9)}, ValueError),
    "float32, float16": ({"u": torch.zeros(2, 4, 9, dtype=torch.int32)}, TypeError),
    "A must be (4, 2)": ({"A": torch.zeros(3, 2)}, ValueError),
    "A must be torch.float32": ({"A": torch.zeros(4, 2, dtype=torch.float64)}, TypeError),
    "delta must be torch.float32 beside": ({"delta": torch.zeros(2, 4, 9).half()}, TypeError),
    "delta must be torch.float16 or torch.float32": (
        {"u": torch.zeros(2, 4, 9).half(), "delta": torch.zeros(2, 4, 9).bfloat16()},
        TypeError,
    ),
    "delta must be (2, 4, 9)": ({"delta": torch.zeros(2, 4, 8)}, ValueError),
    "which does not divide the 4 channels": ({"B": torch.zeros(2, 3, 2, 9), "C": torch.zeros(2, 3, 2, 9)}, ValueError),
    "C must be (2, 1, 2, 9)": ({"C": torch.zeros(2, 1, 3, 9)}, ValueError),
    "legal: 1 to 256": ({"A": torch.zeros(4, 257)}, ValueError),
    "D must be (4,)": ({"D": torch.zeros(5)}, ValueError),
    "delta_bias must be (4,)": ({"delta_bias": torch.zeros(1)}, ValueError),
    "z must be (2, 4, 9)": ({"z": torch.zeros(2, 4, 1)}, ValueError),
    "is on meta": ({"C": torch.zeros(2, 1, 2, 9, device="meta")}, ValueError),
    "impl='fast'": ({"impl": "fast"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    change, kind = BAD[message]
    inputs = to_dtype(scan_inputs(2, 4, 9, 2), torch.float32) | change
    with pytest.raises(kind, match=".*") as caught:
        selective_scan(**inputs)
    assert message in str(caught.value)
