"""The nodes of onnx_operators.py in standard ONNX operators, for runtimes that know no others.

What takes long in such a graph is the number of its steps. ONNX's Scan walks through time with the whole batch, all
routes and all states at once. Where states are few a token is too little work for a step: time is then cut into
segments of `SEGMENT` tokens, all of which take their first step together, then their second; a second Scan carries the
states from segment to segment, and each token adds what its segment was given (as the reference of `selective_scan`).

Sizes are read from the tensors: batch, height and width are free. Inside, time leads and channels are innermost:
u and dt (L, B, G, 1, E), B (L, B, G, N, 1), C (L, B, G, 1, N), A (G, N, E), D (G, 1, E), states (B, G, N, E), with G
routes or groups and E channels of each.
"""

from __future__ import annotations

from onnx import FunctionProto, ModelProto, NodeProto, parser
from onnx.inliner import inline_local_functions

from .onnx_operators import DOMAIN, NODES

SEGMENT = 32
FEW_STATES = 8
"""Below so many states of a channel time is cut into segments."""

# A is given to a step as a state that stays: not every runtime lets the body of a Scan see what is outside of it
_STEP = """
    rates_next = Identity(rates)
    logarithm = Mul(d, rates) decay = Exp(logarithm) kept = Mul(decay, h) added = Mul(x, B_t)
    h_next = Add(kept, added)
    y_t = MatMul(C_t, h_next)"""

_CONSTANTS = """
    zero = Constant<value_float = 0.0>()
    none = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>()
    minus_one = Constant<value_ints = [-1]>()
    beginning = Constant<value_ints = [-9223372036854775807]>()
    two = Constant<value_ints = [2]>()
    three = Constant<value_ints = [3]>()
    four = Constant<value_ints = [4]>()"""

_RECURRENCE = f"""
    sizes = Shape<start = 1, end = 3>(dt)
    widths = Shape<start = 1>(A)
    shape = Concat<axis = 0>(sizes, widths)
    start = Expand(zero, shape)
    rates_end, end, y0 = Scan<num_scan_inputs = 4, body = step (
        float[] rates, float[] h, float[] d, float[] x, float[] B_t, float[] C_t)
        => (float[] rates_next, float[] h_next, float[] y_t) {{{_STEP}
    }}>(A, start, dt, dtu, B, C)"""

_SEGMENTS = f"""
    length = Shape<end = 1>(dt)
    segment = Constant<value_ints = [{SEGMENT}]>()
    up = Sub(segment, one) more = Add(length, up) segments = Div(more, segment)
    whole = Mul(segments, segment) missing = Sub(whole, length)
    zeros = Constant<value_ints = [0, 0, 0, 0, 0]>()
    others = Constant<value_ints = [0, 0, 0, 0]>()
    pads = Concat<axis = 0>(zeros, missing, others)
    pieces = Concat<axis = 0>(minus_one, segment)
    {{cut}}
    sizes = Shape<start = 1, end = 4>(dt_s)
    widths = Shape<start = 1>(A)
    shape = Concat<axis = 0>(sizes, widths)
    start = Expand(zero, shape)
    since_sizes = Shape<start = 1>(dt_s)
    since_start = Expand(zero, since_sizes)
    rates_end, end, total, y_s, since = Scan<num_scan_inputs = 4, body = step (
        float[] rates, float[] h, float[] before, float[] d, float[] x, float[] B_t, float[] C_t)
        => (float[] rates_next, float[] h_next, float[] passed, float[] y_t, float[] passed_t) {{{{{_STEP}
        passed = Add(before, d)
        passed_t = Identity(passed)
    }}}}>(A, start, since_start, dt_s, dtu_s, B_s, C_s)
    total_logarithm = Mul(total, A) through = Exp(total_logarithm)
    carried_sizes = Shape<start = 1>(end)
    carried_start = Expand(zero, carried_sizes)
    carried_end, given = Scan<num_scan_inputs = 2, body = carry (float[] H, float[] factor, float[] own)
        => (float[] H_next, float[] H_before) {{{{
        H_before = Identity(H)
        kept_H = Mul(factor, H)
        H_next = Add(kept_H, own)
    }}}}>(carried_start, through, end)
    since_logarithm = Mul(since, A) fading = Exp(since_logarithm) left = Mul(fading, given)
    of_given = MatMul(C_s, left)
    y_all = Add(y_s, of_given)
    y_turned = Transpose<perm = [1, 0, 2, 3, 4, 5]>(y_all)
    rest = Shape<start = 2>(y_turned)
    joined = Concat<axis = 0>(minus_one, rest)
    y_long = Reshape(y_turned, joined)
    y0 = Slice(y_long, none, length, none)""".format(
    cut="\n    ".join(
        f"{x}_p = Pad({x}, pads) {x}_rest = Shape<start = 1>({x}) {x}_sizes = Concat<axis = 0>(pieces, {x}_rest) "
        f"{x}_r = Reshape({x}_p, {x}_sizes) {x}_s = Transpose<perm = [1, 0, 2, 3, 4, 5]>({x}_r)"
        for x in ("dt", "dtu", "B", "C")
    )
)


def _scan(n_state: int, softplus: bool) -> str:
    """From u, raw, B, C, A, D, bias to y (L, B, G, 1, E); all as inside, `raw` and `bias` before the softplus."""
    return f"""{_CONSTANTS}
    shifted = Add(raw, bias)
    dt = {"Softplus" if softplus else "Identity"}(shifted)
    dtu = Mul(dt, u)
    {_SEGMENTS if n_state < FEW_STATES else _RECURRENCE}
    skipped = Mul(u, D)
    y = Add(y0, skipped)"""


def _parameters(groups: str) -> str:
    """A (G * E, N), D and bias (G * E) as inside, with the number of groups in the tensor `groups`."""
    return f"""
    A_sizes = Shape<start = 1>(A_rows)
    A_shape = Concat<axis = 0>({groups}, minus_one, A_sizes)
    A_groups = Reshape(A_rows, A_shape)
    A = Transpose<perm = [0, 2, 1]>(A_groups)
    row_shape = Concat<axis = 0>({groups}, one, minus_one)
    D = Reshape(D_row, row_shape)
    bias = Reshape(bias_row, row_shape)"""


def _routes(maps: list[str], columns: list[bool], backwards: list[bool]) -> tuple[str, str]:
    """Text that brings maps (B, H, W, D), one for each route, and proj to what `_scan` takes, and text that sums its
    result over the routes into `out` (B, H, W, D)."""
    routes, count = range(len(maps)), len(maps)
    before = [
        "rank = Shape<start = 2>(dt_weight) state = Shape<start = 1>(A_rows)",
        "fields = Concat<axis = 0>(rank, state, state)",
        "weights = Transpose<perm = [0, 2, 1]>(dt_weight)",
        f"{', '.join(f'weight_{k}' for k in routes)} = Split<axis = 0, num_outputs = {count}>(weights)",
    ]
    walks: dict[str, list[str]] = {}  # what brings a tensor to a sequence, by the name of that; routes share them

    def walk(source: str, k: int) -> str:
        """(B, H, W, *) -> (L, B, *), in the order of the route or against it."""
        way, order = ("columns", [2, 1, 0, 3]) if columns[k] else ("rows", [1, 2, 0, 3])
        name = f"{source}_{way}"
        walks[name] = [
            f"{name}_map = Transpose<perm = {order}>({source})",
            f"{name}_map_shape = Shape({name}_map) {name}_sizes = Shape<start = 2>({name}_map)",
            f"{name}_shape = Concat<axis = 0>(minus_one, {name}_sizes)",
            f"{name} = Reshape({name}_map, {name}_shape)",
        ]
        return name

    u, each = {}, {}
    for k in routes:
        u[k], fields = walk(maps[k], k), walk("proj", k)
        parts = ", ".join(f"{fields}_{j}" for j in routes)
        walks[fields].append(f"{parts} = Split<axis = 2, num_outputs = {count}>({fields})")
        each |= {f"u_{k}": u[k], f"f_{k}": f"{fields}_{k}"}
    before += [line for lines in walks.values() for line in lines]
    for k in routes:
        for name in (f"u_{k}", f"f_{k}"):
            if backwards[k]:
                before.append(f"{name} = Slice({each[name]}, minus_one, beginning, none, minus_one)")
                each[name] = name
        before += [
            f"r_{k}, B_{k}, C_{k} = Split<axis = 2>({each[f'f_{k}']}, fields)",
            f"w_{k} = Squeeze(weight_{k}, none)",
            f"dt_{k} = MatMul(r_{k}, w_{k})",
        ]
        each |= {name: name for name in (f"dt_{k}", f"B_{k}", f"C_{k}")}
    for name, joined, axes in (("u", "u", "at"), ("dt", "raw", "at"), ("B", "B", "at_B"), ("C", "C", "at")):
        before += [f"{name}_{k}_e = Unsqueeze({each[f'{name}_{k}']}, {axes})" for k in routes]
        before.append(f"{joined} = Concat<axis = 2>({', '.join(f'{name}_{k}_e' for k in routes)})")
    axes = "at = Constant<value_ints = [2, 3]>() at_B = Constant<value_ints = [2, 4]>()"
    after = [f"{', '.join(f'y_{k}' for k in routes)} = Split<axis = 2, num_outputs = {count}>(y)"]
    for k in routes:
        kept = f"y_{k}_back" if backwards[k] else f"y_{k}"
        if backwards[k]:
            after.append(f"{kept} = Slice(y_{k}, minus_one, beginning, none, minus_one)")
        order = [2, 1, 0, 3] if columns[k] else [2, 0, 1, 3]
        after += [
            f"y_{k}_map = Reshape({kept}, {u[k]}_map_shape)",
            f"out_{k} = Transpose<perm = {order}>(y_{k}_map)",
        ]
    after.append(f"out = Sum({', '.join(f'out_{k}' for k in routes)})")
    return "\n    ".join([axes, *before]), "\n    ".join(after)


def _ss2d_scan(columns: int, backwards: int, n_state: int) -> str:
    bits = [[bool(number >> k & 1) for k in range(4)] for number in (columns, backwards)]
    before, after = _routes(["x"] * 4, *bits)
    body = _scan(n_state, softplus=True).removeprefix(_CONSTANTS)
    return f"""(x, proj, dt_weight, A_rows, D_row, bias_row) => (out) {{{_CONSTANTS}{_parameters("four")}
    {before}{body}
    {after}
    }}"""


def _bidirectional_scan(n_state: int) -> str:
    """A map of one column is a sequence."""
    before, after = _routes(["there", "back"], [False] * 2, [False, True])
    body = _scan(n_state, softplus=True).removeprefix(_CONSTANTS)
    return f"""(x_forward, x_backward, proj_tokens, dt_weight, A_rows, D_row, bias_row) => (tokens) {{{_CONSTANTS}
    {_parameters("two")}
    there = Unsqueeze(x_forward, two) back = Unsqueeze(x_backward, two) proj = Unsqueeze(proj_tokens, two)
    {before}{body}
    {after}
    tokens = Squeeze(out, two)
    }}"""


def _selective_scan(softplus: bool, n_state: int) -> str:
    body = _scan(n_state, softplus).removeprefix(_CONSTANTS)
    return f"""(u_rows, delta_rows, A_rows, B_rows, C_rows, D_row, bias_row) => (out) {{{_CONSTANTS}
    groups = Shape<start = 1, end = 2>(B_rows)
    {_parameters("groups")}
    u_time = Transpose<perm = [2, 0, 1]>(u_rows) delta_time = Transpose<perm = [2, 0, 1]>(delta_rows)
    leading = Shape<end = 2>(u_time)
    u_shape = Concat<axis = 0>(leading, groups, one, minus_one)
    u = Reshape(u_time, u_shape) raw = Reshape(delta_time, u_shape)
    B_time = Transpose<perm = [3, 0, 1, 2]>(B_rows) C_time = Transpose<perm = [3, 0, 1, 2]>(C_rows)
    B = Unsqueeze(B_time, four) C = Unsqueeze(C_time, three){body}
    y_shape = Concat<axis = 0>(leading, minus_one)
    y_time = Reshape(y, y_shape)
    out = Transpose<perm = [1, 2, 0]>(y_time)
    }}"""


def _causal_conv1d(silu: bool, reverse: bool, channels: int, taps: int) -> str:
    pads = [0, taps - 1] if reverse else [taps - 1, 0]
    turned = "Slice(weight, minus_one, beginning, one, minus_one)" if reverse else "Identity(weight)"
    activation = "gate = Sigmoid(y) z = Mul(y, gate)" if silu else "z = Identity(y)"
    return f"""(tokens, weight, bias) => (out) {{{_CONSTANTS}
    x = Transpose<perm = [0, 2, 1]>(tokens)
    taps = {turned}
    kernel = Unsqueeze(taps, one)
    y = Conv<group = {channels}, pads = {pads}>(x, kernel, bias)
    {activation}
    out = Transpose<perm = [0, 2, 1]>(z)
    }}"""


def _text(node: NodeProto, shape_of: dict[str, list[int]]) -> str:
    """Parameters, results and body of a function that does what `node` does."""
    given = {attribute.name: attribute.i for attribute in node.attribute}
    tensors = dict(zip(NODES[node.op_type][0].split(), node.input, strict=True))
    if node.op_type == "CausalConv1d":
        return _causal_conv1d(bool(given["silu"]), bool(given["reverse"]), *shape_of[tensors["weight"]])
    n_state = shape_of[tensors["A"]][1]
    if node.op_type == "SS2DScan":
        return _ss2d_scan(given["columns"], given["backwards"], n_state)
    if node.op_type == "BidirectionalScan":
        return _bidirectional_scan(n_state)
    return _selective_scan(bool(given["softplus"]), n_state)


def as_functions(model: ModelProto) -> dict[str, NodeProto]:
    """Turn our nodes, in place, into calls of functions of the model, which any runtime can follow. Returns the nodes
    as they were, by name."""
    shape_of = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    shape_of |= {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    functions: dict[str, FunctionProto] = {}
    before: dict[str, NodeProto] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            before[node.name] = NodeProto()
            before[node.name].CopyFrom(node)
            text = _text(node, shape_of)
            if text not in functions:
                head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]> {node.op_type}_{len(functions)} '
                functions[text] = parser.parse_function(head + text)
            del node.attribute[:]
            node.op_type = functions[text].name
    model.functions.extend(functions.values())
    return before


def inline(model: ModelProto) -> ModelProto:
    """The same without functions and our domain."""
    model = inline_local_functions(model)
    needed = {output.name for output in model.graph.output}
    used = []
    for node in reversed(model.graph.node):  # without constants of functions that did not need them
        if needed.intersection(node.output):
            used.append(node)
            needed.update(node.input)
            needed.update(name for attribute in node.attribute for inner in attribute.g.node for name in inner.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(used))
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def as_nodes(model: ModelProto, before: dict[str, NodeProto]) -> ModelProto:
    """The way back from `as_functions`; the inputs and outputs of the nodes may be others by now."""
    for node in model.graph.node:
        if node.domain == DOMAIN:
            node.op_type = before[node.name].op_type
            node.attribute.extend(before[node.name].attribute)
    del model.functions[:]
    return model
