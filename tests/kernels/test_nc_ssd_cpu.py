"""Non-causal SSD in the compiled CPU library: what its tiles, parts and direct reads could get wrong."""

import pytest
import torch

from ssm_ops import nc_ssd
from tests.kernels.common import rms_error
from tests.kernels.ssd_common import leaves, loop_nc_ssd, run, ssd_inputs

OPTIONS = {"dt_softplus": True}


def test_same_bits_on_any_number_of_threads():
    inputs = ssd_inputs(1, 200, 4, 20, 12, groups=2, D=2)  # four tiles, each a part of the sums of its own
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(nc_ssd, leaves(inputs, torch.float32), **OPTIONS, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [16, 20])
def test_parts_of_wider_tensors_are_read_where_they_lie(channels, dtype):
    """As in a model, x, B and C are parts of one tensor, and dt of another."""
    wide, steps = torch.randn(2, 70, 3 * channels + 2 * 9).to(dtype), torch.randn(2, 70, 5)
    x, B, C = wide.split([3 * channels, 9, 9], dim=-1)
    parts = x.unflatten(2, (3, channels)), steps[..., 1:4], B.unsqueeze(2), C.unsqueeze(2)
    A = -torch.rand(3)
    got = nc_ssd(*parts[:2], A, *parts[2:], **OPTIONS, impl="cpu")
    x, dt, B, C = (t.contiguous() for t in parts)
    assert torch.equal(got, nc_ssd(x, dt, A, B, C, **OPTIONS, impl="cpu"))
    want = loop_nc_ssd(x.double(), dt.double(), A.double(), B.double(), C.double(), dt_softplus=True)
    assert rms_error(got, want) < {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def test_expanded_and_transposed_inputs():
    """Rows that are one and the same, and numbers of a head that do not lie side by side."""
    x = torch.randn(1, 8, 2, 5).expand(2, 8, 2, 5)
    B, C = torch.randn(2, 8, 6, 1).transpose(2, 3), torch.randn(2, 6, 8).transpose(1, 2).unsqueeze(2)
    dt, A, weight = torch.rand(2, 8, 1).expand(2, 8, 2), -torch.rand(2), torch.randn(5, 2, 8, 2).permute(1, 2, 3, 0)

    def gradients(impl, *given):
        given = [t.detach().requires_grad_() for t in given]
        # the gradient of the result is not contiguous either
        (nc_ssd(*given[:2], A.to(given[0].dtype), *given[2:], impl=impl) * weight).sum().backward()
        return [t.grad for t in given]

    found = gradients("cpu", x, dt, B, C)
    for got, want in zip(found, gradients("reference", *(t.double() for t in (x, dt, B, C))), strict=True):
        assert rms_error(got, want) < 2e-6


@pytest.mark.parametrize(("length", "channels", "n_state"), [(64, 16, 16), (129, 17, 5), (3, 1, 1), (448, 8, 40)])
def test_sizes_around_tiles_and_vectors(length, channels, n_state):
    inputs = ssd_inputs(1, length, 2, channels, n_state, groups=2)
    want = run(loop_nc_ssd, leaves(inputs, torch.float64), **OPTIONS)
    for key, value in run(nc_ssd, leaves(inputs, torch.float32), **OPTIONS, impl="cpu").items():
        assert rms_error(value, want[key]) < 2e-6, key
