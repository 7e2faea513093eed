"""The operators of `ssm_ops` as nodes of an ONNX graph, in a domain of their own.

The nodes are what kernels/csrc/onnxruntime computes: float32 only, channels innermost, so that the transposes around
them meet and vanish. portable.py has the same in standard operators. What standard_operators.py has is written in these
from the start.

Shapes: B batch, D channels, H W map, L tokens, N state, R rank of the step sizes, G groups, K taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript import values

import ssm_ops.onnxruntime
from ssm_ops._common import route_bits

from .standard_operators import cross_merge, cross_scan, nc_ssd, silu_gate, ssd_chunk_scan, unused

DOMAIN = ssm_ops.onnxruntime.DOMAIN
BLOCK = "Block"

# inputs and integer attributes of the nodes; all have one more, the version
NODES = {
    # x (B, H, W, D), proj (B, H, W, 4 * (R + 2N)), dt_weight (4, D, R), A (4 * D, N), D and dt_bias (4 * D)
    # -> (B, H, W, D); bit k of columns and backwards tells how route k walks
    "SS2DScan": ("x proj dt_weight A D dt_bias", "columns backwards"),
    # x_forward, x_backward (B, L, D), proj (B, L, 2 * (R + 2N)), the others with 2 instead of 4 -> (B, L, D)
    "BidirectionalScan": ("x_forward x_backward proj dt_weight A D dt_bias", ""),
    # u, delta (B, D, L), A (D, N), B and C (B, G, N, L), D and delta_bias (D) -> (B, D, L)
    "SelectiveScan": ("u delta A B C D delta_bias", "softplus"),
    # x (B, L, D), weight (D, K), bias (D) -> (B, L, D)
    "CausalConv1d": ("x weight bias", "silu reverse"),
}


def _schema(name: str, inputs: str, attributes: str) -> OpSchema:
    number = "tensor(float)"
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(each, number) for each in inputs.split()],
        outputs=[OpSchema.FormalParameter("y", number)],
        attributes=[OpSchema.Attribute(each, OpSchema.AttrType.INT, "") for each in [*attributes.split(), "version"]],
    )


def _node(name: str, *inputs, **attributes: int):
    ours = values.Op(values.Opset(DOMAIN, 1), name, _schema(name, *NODES[name]))
    return ours(*inputs, **attributes, version=ssm_ops.onnxruntime.VERSION)


def _zeros(count: int):
    return op.Expand(op.Constant(value_float=0.0), op.Constant(value_ints=[count]))


# ---- what each operator of PyTorch becomes; arguments by the names of its schema ------------------------------------


def _ss2d_scan(x, proj, dt_weight, A, D, dt_bias, scans, **_flags):
    columns, backwards = route_bits(scans)
    tokens = op.Transpose(x, perm=[0, 2, 3, 1])
    y = _node("SS2DScan", tokens, proj, dt_weight, A, D, dt_bias, columns=columns, backwards=backwards)
    return op.Transpose(y, perm=[0, 3, 1, 2]), unused(A)


def _bidirectional_scan(x_forward, x_backward, proj, dt_weight, A, D, dt_bias, **_flags):
    return _node("BidirectionalScan", x_forward, x_backward, proj, dt_weight, A, D, dt_bias), unused(A)


def _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **_flags):
    dim = A.shape[0]
    if delta.shape[1] != dim:
        raise NotImplementedError(f"{delta.shape[1]} step sizes for {dim} channels have no ONNX form here")
    D, delta_bias = (_zeros(dim) if x is None else x for x in (D, delta_bias))
    y = _node("SelectiveScan", u, delta, A, B, C, D, delta_bias, softplus=int(delta_softplus))
    if z is not None:
        y = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return y, unused(A), unused(A)


def _causal_conv1d(x, weight, bias, silu, reverse, **_flags):
    bias = _zeros(weight.shape[0]) if bias is None else bias
    tokens = op.Transpose(x, perm=[0, 2, 1])
    y = _node("CausalConv1d", tokens, weight, bias, silu=int(silu), reverse=int(reverse))
    return op.Transpose(y, perm=[0, 2, 1])


def _block(tensors, path, results):
    """A block of `blocks.py`, which onnx_file.py replaces by what it computes."""
    number = "tensor(float)"
    schema = OpSchema(
        BLOCK,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(f"x{i}", number) for i in range(len(tensors))],
        outputs=[OpSchema.FormalParameter(f"y{i}", number) for i in range(results)],
        attributes=[OpSchema.Attribute("path", OpSchema.AttrType.STRING, "")],
    )
    made = values.Op(values.Opset(DOMAIN, 1), BLOCK, schema)(*tensors, path=path)
    return [made] if results == 1 else list(made)


_TRANSLATIONS = {
    "ss2d_scan_fwd": _ss2d_scan,
    "bidirectional_scan_fwd": _bidirectional_scan,
    "selective_scan_fwd": _selective_scan,
    "causal_conv1d_fwd": _causal_conv1d,
    "nc_ssd_fwd": nc_ssd,
    "ssd_chunk_scan_fwd": ssd_chunk_scan,
    "cross_scan": cross_scan,
    "cross_merge": cross_merge,
    "silu_gate_fwd": silu_gate,
}


def translations() -> dict[Callable, Callable]:
    """For `torch.onnx.export`, of the operators of PyTorch by their overloads."""

    def by_name(overload, translation: Callable) -> Callable:
        names = [argument.name for argument in overload._schema.arguments]
        return lambda *args: translation(**dict(zip(names, args, strict=True)))

    overloads = {getattr(torch.ops.ssm_ops, name).default: made for name, made in _TRANSLATIONS.items()}
    overloads[torch.ops.analyze.block.default] = _block
    return {overload: by_name(overload, made) for overload, made in overloads.items()}
