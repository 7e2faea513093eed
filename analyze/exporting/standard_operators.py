"""Operators of `ssm_ops` in standard ONNX operators, whatever the form of the file: they are mostly matrix products.

Mamba-2's decay is one number per head. So its scan is products, too, in two levels: within chunks of `CHUNK` tokens,
and between the chunks, whose states reach all later ones at once. Nothing walks through time.

Arguments are named as in the schemas of PyTorch's operators, and results for the backward pass are `unused`.

Shapes: B batch, L tokens, H heads, P channels of a head, N state, G groups, E = H / G heads of a group, S chunks,
T = CHUNK tokens of a chunk; of maps H, W and C channels.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, numpy_helper
from onnxscript import opset18 as op

from ssm_ops._common import ROUTES

CHUNK = 64
_LAST = np.iinfo(np.int64).max


def unused(like):
    """In the place of results for the backward pass, which no graph uses."""
    return op.Identity(like)


def ints(*numbers: int):
    return op.Constant(value_ints=list(numbers))


def _triangle(below: int):
    """(T, T): 1 where the row is later than the column by at least `below`."""
    return op.Constant(value=numpy_helper.from_array(np.tri(CHUNK, k=-below, dtype=np.float32)))


def _reversed(x, axis: int):
    return op.Slice(x, ints(-1), ints(-_LAST), ints(axis), ints(-1))


def _last(x, axis: int):
    return op.Slice(x, ints(-1), ints(_LAST), ints(axis))


def silu_gate(y, z, scale, **_flags):
    gated = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return gated if scale == 1 else op.Mul(gated, op.Constant(value_float=scale))


def nc_ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, positive, **_flags):
    """Heads in groups: (B, L, H, P) -> (B, G, L, E * P), head e * G + g in group g; with one group nothing moves."""
    (heads, width), groups = x.shape[2:], B.shape[2]
    each = heads // groups

    def to_groups(t, width: int):
        if groups == 1:
            return op.Reshape(t, ints(0, 1, -1, each * width))  # a batch of 0 is none
        t = op.Transpose(op.Reshape(t, ints(0, -1, each, groups, width)), perm=[0, 3, 1, 2, 4])
        return op.Reshape(t, ints(0, groups, -1, each * width))

    step = dt if dt_bias is None else op.Add(dt, dt_bias)
    step = op.Softplus(step) if dt_softplus else step
    weight = op.Mul(step, op.Neg(A) if positive else A)
    weighted = to_groups(op.Mul(op.Unsqueeze(weight, ints(3)), x), width)
    keys, queries = (op.Transpose(t, perm=perm) for t, perm in ((B, [0, 2, 3, 1]), (C, [0, 2, 1, 3])))
    y = op.MatMul(queries, op.MatMul(keys, weighted))  # (B, G, L, E * P)
    if groups == 1:
        y = op.Reshape(y, ints(0, -1, heads, width))
    else:
        y = op.Transpose(op.Reshape(y, ints(0, groups, -1, each, width)), perm=[0, 2, 3, 1, 4])
        y = op.Reshape(y, ints(0, -1, heads, width))
    if D is not None:
        y = op.Add(y, op.Mul(x, op.Reshape(D, ints(heads, -1))))
    return y, unused(A)


def ssd_chunk_scan(x, dt, A, B, C, D, dt_bias, initial_states, dt_softplus, **_flags):
    """Its result does not depend on the size of the chunks."""
    (heads, width), (groups, n_state) = x.shape[2:], B.shape[2:]
    each = heads // groups
    length = op.Shape(x, start=1, end=2)
    missing = op.Mod(op.Neg(length), ints(CHUNK))

    def in_chunks(t, rank: int, *inner: int):
        """(B, L, *) of `rank` dimensions -> (B, S, T, *inner); tokens that are missing in the last chunk are 0."""
        pads = op.Concat(ints(*[0] * (rank + 1)), missing, ints(*[0] * (rank - 2)), axis=0)
        return op.Reshape(op.Pad(t, pads), ints(0, -1, CHUNK, *inner))

    step = dt if dt_bias is None else op.Add(dt, dt_bias)
    step = op.Softplus(step) if dt_softplus else step
    sx = in_chunks(op.Mul(op.Unsqueeze(step, ints(3)), x), 4, groups, each, width)
    sx = op.Transpose(sx, perm=[0, 1, 3, 4, 2, 5])  # (B, S, G, E, T, P)
    a = op.Transpose(in_chunks(step, 3, groups, each), perm=[0, 1, 3, 4, 2])
    a = op.Mul(a, op.Reshape(A, ints(groups, each, 1)))  # (B, S, G, E, T)
    keys, queries = (op.Unsqueeze(in_chunks(t, 4, groups, n_state), ints(4)) for t in (B, C))
    keys = op.Transpose(keys, perm=[0, 1, 3, 4, 5, 2])  # (B, S, G, 1, N, T)
    queries = op.Transpose(queries, perm=[0, 1, 3, 4, 2, 5])  # (B, S, G, 1, T, N)

    # decay from token j to token i, exp(a_{j+1} + .. + a_i): each sum is formed by itself, for its digits
    sums = op.CumSum(op.Mul(op.Unsqueeze(a, ints(5)), _triangle(1)), ints(4))
    decay = op.Mul(op.Exp(sums), _triangle(0))  # (B, S, G, E, i, j)
    within = op.MatMul(op.Mul(decay, op.MatMul(queries, keys)), sx)  # (B, S, G, E, T, P)

    # what each chunk adds to the state, and how the states before the chunks sum it up
    to_end = op.Transpose(_last(decay, 4), perm=[0, 1, 2, 3, 5, 4])
    added = op.MatMul(keys, op.Mul(to_end, sx))  # (B, S, G, E, N, P)
    added = op.Reshape(op.Transpose(added, perm=[0, 2, 3, 1, 4, 5]), ints(0, groups, each, -1, n_state * width))
    since_start = op.CumSum(a, ints(4))
    total = op.Transpose(_last(since_start, 4), perm=[0, 2, 3, 1, 4])  # (B, G, E, S, 1)
    count = op.Squeeze(op.Shape(total, start=3, end=4))
    chunks = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    later = op.Cast(op.Greater(op.Unsqueeze(chunks, ints(1)), chunks), to=TensorProto.FLOAT)  # (S, S): s after r
    reach = op.Mul(op.Exp(op.CumSum(op.Mul(total, later), ints(3), exclusive=1)), later)  # to the state before chunk s
    states = op.MatMul(reach, added)  # (B, G, E, S, N * P)
    if initial_states is not None:
        first = op.Reshape(initial_states, ints(0, groups, each, width, n_state))
        first = op.Reshape(op.Transpose(first, perm=[0, 1, 2, 4, 3]), ints(0, groups, each, 1, n_state * width))
        states = op.Add(states, op.Mul(op.Exp(op.CumSum(total, ints(3), exclusive=1)), first))
    states = op.Transpose(op.Reshape(states, ints(0, groups, each, -1, n_state, width)), perm=[0, 3, 1, 2, 4, 5])
    carried = op.Mul(op.Unsqueeze(op.Exp(since_start), ints(5)), op.MatMul(queries, states))

    y = op.Transpose(op.Add(within, carried), perm=[0, 1, 4, 2, 3, 5])
    y = op.Slice(op.Reshape(y, ints(0, -1, heads, width)), ints(0), length, ints(1))
    if D is not None:
        y = op.Add(y, op.Mul(x, op.Reshape(D, ints(heads, -1))))
    return y, unused(A), unused(A)


def cross_scan(x, in_channel_first, out_channel_first, one_by_one, scans, **_flags):
    channels = x.shape[2 if one_by_one else 1] if in_channel_first else x.shape[-1]
    if in_channel_first:
        x = op.Transpose(x, perm=[0, 3, 4, 1, 2] if one_by_one else [0, 2, 3, 1])
    maps = [x] * 4
    if one_by_one:
        maps = [op.Squeeze(each, ints(3)) for each in op.Split(x, axis=3, num_outputs=4)]
    routes = []
    for each, (columns, backwards) in zip(maps, ROUTES[scans], strict=True):
        each = op.Transpose(each, perm=[0, 2, 1, 3]) if columns else each
        each = op.Reshape(each, ints(0, -1, channels))
        routes.append(op.Unsqueeze(_reversed(each, 1) if backwards else each, ints(2)))
    y = op.Concat(*routes, axis=2)  # (B, L, 4, C)
    return op.Transpose(y, perm=[0, 2, 3, 1]) if out_channel_first else y


def cross_merge(y, in_channel_first, out_channel_first, one_by_one, scans, **_flags):
    if one_by_one:
        raise NotImplementedError("cross_merge of routes that are not summed has no ONNX form here")
    channels = y.shape[2 if out_channel_first else 4]
    if out_channel_first:
        y = op.Transpose(y, perm=[0, 3, 4, 1, 2])  # (B, H, W, 4, C)
    batch, height, width = (op.Shape(y, start=i, end=i + 1) for i in range(3))
    turned = op.Concat(batch, width, height, ints(channels), axis=0)
    merged = []
    for each, (columns, backwards) in zip(op.Split(y, axis=3, num_outputs=4), ROUTES[scans], strict=True):
        each = op.Reshape(each, ints(0, -1, channels))
        each = _reversed(each, 1) if backwards else each
        if columns:
            each = op.Transpose(op.Reshape(each, turned), perm=[0, 2, 1, 3])
            each = op.Reshape(each, ints(0, -1, channels))
        merged.append(each)
    z = op.Sum(*merged)  # (B, L, C)
    return op.Transpose(z, perm=[0, 2, 1]) if in_channel_first else z
