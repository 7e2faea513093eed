"""Operators that every exported file has in standard ONNX operators compute what they do in PyTorch."""

import itertools
import warnings

import onnxruntime
import pytest
import torch
from torch import nn

import ssm_ops
from analyze.exporting.onnx_file import translations
from ssm_ops._common import SCANS


class Call(nn.Module):
    def __init__(self, function, **flags):
        super().__init__()
        self.function, self.flags = function, flags

    def forward(self, *tensors):
        return self.function(*tensors, **self.flags)


def in_onnx(module: nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.export.export(module, tensors, strict=False)
        made = torch.onnx.export(
            program, custom_translation_table=translations(), opset_version=18, dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def ssd_inputs(length: int, groups: int, scale: float = 1.0) -> list[torch.Tensor]:
    """x, dt, A, B, C of two images, 4 heads of 6 channels and 5 states; `scale` makes decays strong."""
    x, dt, A = torch.randn(2, length, 4, 6), torch.randn(2, length, 4) * scale, -torch.rand(4) * scale - 0.1
    return [x, dt, A, torch.randn(2, length, groups, 5), torch.randn(2, length, groups, 5)]


@pytest.mark.parametrize(("length", "groups", "scale"), [(150, 2, 1), (64, 4, 1), (3, 1, 1), (130, 1, 30)])
def test_ssd_chunk_scan(length, groups, scale):
    """Chunks that are full, and a last one that is not; decays that leave nothing of a state."""
    tensors = ssd_inputs(length, groups, scale)
    module = Call(ssm_ops.ssd_chunk_scan, dt_softplus=True)
    expected = ssm_ops.ssd_chunk_scan(*tensors, dt_softplus=True, impl="reference")
    torch.testing.assert_close(in_onnx(module, *tensors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [(4,), (4, 6)])
def test_ssd_chunk_scan_from_a_state(skip):
    x, dt, A, B, C = ssd_inputs(100, 2)
    tensors = [x, dt.abs(), A, B, C, torch.randn(skip), torch.rand(4), torch.randn(2, 4, 6, 5)]

    def scan(x, dt, A, B, C, D, dt_bias, initial_states, impl="auto"):
        given = {"D": D, "dt_bias": dt_bias, "initial_states": initial_states}
        return ssm_ops.ssd_chunk_scan(x, dt, A, B, C, **given, impl=impl)

    expected = scan(*tensors, impl="reference")
    torch.testing.assert_close(in_onnx(Call(scan), *tensors), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scans", SCANS)
def test_routes(scans):
    """All layouts in one graph, of a map (B, C, H, W) and of four, one for each route."""

    def all_layouts(x, four, impl="auto"):
        found = []
        for first, last in itertools.product((True, False), repeat=2):
            flags = {"in_channel_first": first, "out_channel_first": last, "scans": scans, "impl": impl}
            maps = (x, four) if first else (x.permute(0, 2, 3, 1), four.permute(0, 3, 4, 1, 2))
            found += [ssm_ops.cross_scan(each, one_by_one=each.dim() == 5, **flags) for each in maps]
            found.append(ssm_ops.cross_merge(four if last else four.permute(0, 3, 4, 1, 2), **flags))
        return torch.cat([each.flatten(1) for each in found], 1)

    x, four = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3, 5, 7)
    expected = all_layouts(x, four, impl="reference")
    torch.testing.assert_close(in_onnx(Call(all_layouts), x, four), expected, rtol=1e-6, atol=1e-6)
