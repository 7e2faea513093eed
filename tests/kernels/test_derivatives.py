"""Derivatives beyond the first backward: of every operator and implementation, against loops over tokens in float64."""

import functools

import pytest
import torch
from torch.autograd import forward_ad, functional

import ssm_ops
from ssm_ops import (
    bidirectional_scan,
    causal_conv1d,
    cross_merge,
    cross_scan,
    nc_ssd,
    selective_scan,
    silu_gate,
    ssd_chunk_scan,
)
from ssm_ops import ss2d_scan as ss2d
from ssm_ops._library import OPERATORS, available
from tests.kernels import test_bidirectional_scan as bidirectional
from tests.kernels.common import loop_scan, rms_error, scan_inputs, to_dtype
from tests.kernels.ssd_common import loop_nc_ssd, loop_ssd, ssd_inputs
from tests.kernels.test_causal_conv1d import conv_inputs, loop_conv
from tests.kernels.test_ss2d_scan import inputs as ss2d_inputs


def loop_routes(x):
    """(B, C, H, W) -> (B, 4, C, L)"""
    there = [x.flatten(2), x.mT.flatten(2)]
    return torch.stack(there + [t.flip(2) for t in there], 1)


def loop_merge(y):
    """(B, 4, C, H, W) -> (B, C, L), the adjoint of `loop_routes`."""
    height, width = y.shape[3:]
    rows, columns, *back = y.flatten(3).unbind(1)
    rows, columns = rows + back[0].flip(2), columns + back[1].flip(2)
    return rows + columns.unflatten(2, (width, height)).mT.flatten(2)


def loop_ss2d(x, proj, dt_weight, A, D, dt_bias):
    """The definition: routes, step sizes, a loop over tokens, and the sum of the routes brought back."""
    rank, n_state = dt_weight.shape[2], A.shape[1]
    fields = proj.permute(0, 3, 1, 2).unflatten(1, (4, -1))
    fields = torch.stack([loop_routes(fields[:, k])[:, k] for k in range(4)], 1)
    dt, B, C = fields.split([rank, n_state, n_state], 2)
    u, delta = loop_routes(x).flatten(1, 2), (dt_weight @ dt).flatten(1, 2)
    y, _ = loop_scan(u, delta, A, B, C, D, dt_bias, delta_softplus=True)
    return loop_merge(y.unflatten(1, (4, -1)).unflatten(3, x.shape[2:])).unflatten(2, x.shape[2:])


def first(function):
    """Of a function that returns (result, state): the result alone."""
    return lambda *args, **options: function(*args, **options)[0]


# name: (operator, definition, inputs, options); sizes are least ones with more than one of everything
CASES = {
    "selective_scan": (
        selective_scan,
        first(loop_scan),
        lambda: scan_inputs(1, 4, 5, 2, groups=2, delta_dim=2, z=True),
        {"delta_softplus": True},
    ),
    "selective_scan bare": (selective_scan, first(loop_scan), lambda: scan_inputs(2, 2, 4, 1, D=False, bias=False), {}),
    "ssd": (
        functools.partial(ssd_chunk_scan, chunk_size=2, return_final_states=True),
        loop_ssd,
        lambda: ssd_inputs(1, 5, 2, 2, 2, groups=2, D=2, initial=True),
        {"dt_softplus": True},
    ),
    "ssd bare": (
        functools.partial(ssd_chunk_scan, chunk_size=3),
        first(loop_ssd),
        lambda: ssd_inputs(1, 4, 2, 2, 1, D=0, bias=False),
        {},
    ),
    "nc_ssd": (nc_ssd, loop_nc_ssd, lambda: ssd_inputs(1, 4, 4, 2, 2, groups=2), {"dt_softplus": True}),
    "nc_ssd bare": (nc_ssd, loop_nc_ssd, lambda: ssd_inputs(1, 3, 2, 2, 2, D=0, bias=False), {"positive": False}),
    "causal_conv1d": (
        causal_conv1d,
        loop_conv,
        lambda: conv_inputs(2, 3, 5, 3),
        {"activation": "silu", "reverse": True},
    ),
    "causal_conv1d bare": (causal_conv1d, loop_conv, lambda: conv_inputs(1, 2, 4, 2, bias=False), {}),
    "silu_gate": (
        silu_gate,
        lambda y, z, scale: scale * y * torch.nn.functional.silu(z),
        lambda: {name: torch.randn(2, 3, 4).double() for name in ("y", "z")},
        {"scale": 0.5},
    ),
    "ss2d_scan": (ss2d, loop_ss2d, lambda: ss2d_inputs(1, 2, 2, 3, 2, 1), {}),
    "bidirectional_scan": (bidirectional_scan, bidirectional.loop, lambda: bidirectional.inputs(1, 4, 2, 2, 1), {}),
    "cross_scan": (cross_scan, loop_routes, lambda: {"x": torch.randn(2, 2, 2, 3).double()}, {}),
    "cross_merge": (cross_merge, loop_merge, lambda: {"y": torch.randn(2, 4, 2, 2, 3).double()}, {}),
}


class Case:
    """One operator, its definition, and inputs; as functions of the tensors alone."""

    def __init__(self, name: str, impl: str):
        operator, self._loop, make, self._options = CASES[name]
        self.exact = impl == "reference" or "cross" in name
        self._operator = functools.partial(operator, impl=impl)
        made = make()
        self.names = [n for n, t in made.items() if t is not None]
        self.tensors = [made[n] for n in self.names]  # float64

    def loop(self, *tensors):
        return self._loop(**dict(zip(self.names, tensors, strict=True)), **self._options)

    def operator(self, *tensors):
        return self._operator(**dict(zip(self.names, tensors, strict=True)), **self._options)

    def given(self, dtype=None):
        """Leaves for the operator: float64 for what is exact, else as kernels compute."""
        dtype = dtype or (torch.float64 if self.exact else torch.float32)
        return [t.to(dtype).clone().requires_grad_() for t in self.tensors]

    def check(self, got, want, bound=None):
        got, want = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (got, want))
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            g, w = g.detach().double(), w.detach().double()
            assert g.shape == w.shape
            scale = w.abs().max().clamp(min=1e-2)
            assert float((g - w).abs().max() / scale) < (bound or (1e-10 if self.exact else 2e-5))


def kernels(name):
    """Implementations of an operator on the CPU that are not plain PyTorch called by its name."""
    operator = name.split()[0].replace("ssd", "ssd_chunk_scan") if name.startswith("ssd") else name.split()[0]
    return ["auto", *available(OPERATORS[operator], "cpu", torch.float32)]


EVERY = pytest.mark.parametrize("name, impl", [(name, impl) for name in CASES for impl in kernels(name)])
OPERATORS_ONLY = pytest.mark.parametrize(
    "name, impl", [(name, impl) for name in CASES for impl in kernels(name) if impl != "reference"]
)
AUTO_AND_REFERENCE = pytest.mark.parametrize(
    "name, impl", [(name, impl) for name in CASES for impl in ("auto", "reference")]
)


def scalar(function):
    """Sum of the sines of all results: no derivative of it vanishes."""

    def of(*tensors):
        results = function(*tensors)
        return sum(r.sin().sum() for r in (results if isinstance(results, tuple) else (results,)))

    return of


def test_every_operator_is_a_case():
    names = {name.split()[0] for name in CASES}
    plain = {"add_norm", "depthwise_conv"}  # PyTorch's own wherever a derivative is wanted, see their tests
    assert names == set(OPERATORS) - plain - {"ssd_chunk_scan"} | {"ssd"}
    assert set(OPERATORS) <= set(ssm_ops.__all__)


# ---- reverse mode, twice --------------------------------------------------------------------------------------------


@AUTO_AND_REFERENCE
def test_finite_differences_of_first_and_second_derivatives(name, impl):
    """In float64, where "auto" is the operator with its hand-written backward, and "reference" autograd."""
    case = Case(name, impl)
    assert torch.autograd.gradcheck(case.operator, case.given(torch.float64), fast_mode=True)
    assert torch.autograd.gradgradcheck(case.operator, case.given(torch.float64), fast_mode=True)


def penalty(function, tensors):
    """Gradients of f + |grad f|^2, which a gradient penalty asks for; with f and grad f."""
    value = scalar(function)(*tensors)
    grads = torch.autograd.grad(value, tensors, create_graph=True)
    total = value + sum(g.square().sum() for g in grads)
    return value, *grads, *torch.autograd.grad(total, tensors)


@EVERY
def test_gradient_of_a_gradient_penalty(name, impl):
    case = Case(name, impl)
    want = penalty(case.loop, [t.clone().requires_grad_() for t in case.tensors])
    case.check(penalty(case.operator, case.given()), want)


@OPERATORS_ONLY
def test_create_graph_does_not_change_the_first_derivative(name, impl):
    case = Case(name, impl)
    given = case.given()
    plain, graph = (
        torch.autograd.grad(scalar(case.operator)(*given), given, create_graph=create) for create in (False, True)
    )
    assert all(torch.equal(p, g) and not p.requires_grad and g.requires_grad for p, g in zip(plain, graph, strict=True))


@EVERY
def test_of_one_input_alone(name, impl):
    """Where no other tensor needs a gradient, nor the cotangent: what `once_differentiable` lost."""
    case = Case(name, impl)

    def hvp(function, tensors, i):
        def of(x):
            return scalar(function)(*tensors[:i], x, *tensors[i + 1 :])

        return functional.hvp(of, tensors[i], torch.ones_like(tensors[i]))[1]

    given = [t.detach() for t in case.given()]
    for i in range(len(given)):
        case.check(hvp(case.operator, given, i), hvp(case.loop, case.tensors, i))


@pytest.mark.parametrize("name", CASES)
def test_third_derivative(name):
    case = Case(name, "auto")

    def third(function, tensors):
        value = scalar(function)(*tensors)
        for _ in range(2):
            value = sum(g.sin().sum() for g in torch.autograd.grad(value, tensors, create_graph=True))
        return torch.autograd.grad(value, tensors)

    want = third(case.loop, [t.clone().requires_grad_() for t in case.tensors])
    case.check(third(case.operator, case.given(torch.float64)), want, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Gradients of gradients come in the dtype of their input, and are right to a few roundings."""
    made = scan_inputs(1, 4, 9, 2, z=True)
    half = to_dtype(made, dtype)

    def scan(*tensors):
        return selective_scan(**dict(zip(made, tensors, strict=True)), delta_softplus=True)

    rounded = [t.detach().double().requires_grad_() for t in half.values()]
    want, got = (penalty(scan, tensors)[-len(made) :] for tensors in (rounded, list(half.values())))
    for g, w, t in zip(got, want, half.values(), strict=True):
        assert g.dtype == t.dtype and rms_error(g, w) < 10 * torch.finfo(dtype).eps


# ---- functional, torch.func and forward mode ------------------------------------------------------------------------


def transforms():
    """name: (function, its tensors, directions) -> numbers"""

    def own(function, tensors, directions):  # jvp by two backwards
        return functional.jvp(scalar(function), tensors, directions)[1]

    def hessian(function, tensors, directions, **options):
        rest = tensors[1:]
        return functional.hessian(lambda t: scalar(function)(t, *rest), tensors[0], **options)

    def dual(function, tensors, directions):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(tensors, directions, strict=True)]
            return forward_ad.unpack_dual(scalar(function)(*duals)).tangent

    def batched(function, tensors, directions):  # one scan for two sets of all tensors
        return torch.vmap(scalar(function))(*(torch.stack(p) for p in zip(tensors, directions, strict=True)))

    def per_sample(function, tensors, directions):
        grad = torch.func.grad(scalar(function), argnums=tuple(range(len(tensors))))
        return torch.vmap(grad, in_dims=(0, *(None for _ in tensors[1:])))(
            torch.stack([tensors[0], directions[0]]), *tensors[1:]
        )

    def batched_backward(function, tensors, directions):
        tensors = [t.clone().requires_grad_() for t in tensors]
        results = function(*tensors)
        out = results[0] if isinstance(results, tuple) else results
        return torch.autograd.grad(
            out, tensors, torch.stack([out.sin(), out]), is_grads_batched=True, allow_unused=True
        )

    func = torch.func
    return {
        "functional.jvp": own,
        "functional.hessian": hessian,
        "functional.hessian vectorized": functools.partial(hessian, vectorize=True),
        "dual numbers": dual,
        "vmap": batched,
        "vmap of grad": per_sample,
        "is_grads_batched": batched_backward,
        "func.grad": lambda f, t, d: func.grad(scalar(f), argnums=tuple(range(len(t))))(*t),
        "func.vjp": lambda f, t, d: func.vjp(scalar(f), *t)[1](torch.ones((), dtype=t[0].dtype)),
        "func.jvp": lambda f, t, d: func.jvp(scalar(f), tuple(t), tuple(d))[1],
        "func.hessian": lambda f, t, d: func.hessian(scalar(f), argnums=len(t) - 1)(*t),
    }


@pytest.mark.parametrize("transform", transforms().values(), ids=transforms().keys())
@AUTO_AND_REFERENCE
def test_transforms(name, impl, transform):
    case = Case(name, impl)
    generator = torch.Generator().manual_seed(3)
    directions = [t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in case.tensors]
    given = [t.detach() for t in case.given()]
    want = transform(case.loop, tuple(case.tensors), tuple(directions))
    got = transform(case.operator, tuple(given), tuple(d.to(given[0].dtype) for d in directions))
    case.check([g for g in _flat(got) if g is not None], [w for w in _flat(want) if w is not None])


def _flat(x):
    return [x] if isinstance(x, torch.Tensor) or x is None else [t for part in x for t in _flat(part)]


# ---- where operators are nodes of a graph ---------------------------------------------------------------------------


class AsModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("name", [n for n in CASES if "bare" not in n])
def test_exported_operators_are_differentiable(name):
    """An exported model can be trained, whose graph has operators as nodes; it does not quietly learn nothing."""
    case = Case(name, "auto")
    given = case.given()
    exported = torch.export.export(AsModule(case.operator), tuple(t.detach() for t in given)).module()
    assert any("ssm_ops" in str(node.target) for node in exported.graph.nodes)
    want = penalty(case.loop, [t.clone().requires_grad_() for t in case.tensors])
    case.check(penalty(exported, given), want)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of tracing itself
def test_traced_operators_are_nodes_and_differentiable():
    case = Case("selective_scan", "auto")
    given = case.given()
    traced = torch.jit.trace(case.operator, given)
    assert [node.kind() for node in traced.graph.nodes() if "ssm_ops" in node.kind()] == ["ssm_ops::selective_scan_fwd"]
    case.check(penalty(traced, given), penalty(case.loop, [t.clone().requires_grad_() for t in case.tensors]))


@OPERATORS_ONLY
def test_autocast_does_not_reach_second_derivatives(name, impl):
    case = Case(name, impl)
    given = case.given()
    grads = torch.autograd.grad(scalar(case.operator)(*given), given, create_graph=True)
    total = sum(g.square().sum() for g in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = torch.autograd.grad(total, given, retain_graph=True, allow_unused=True)
    plain = torch.autograd.grad(total, given, allow_unused=True)
    assert all(p is u or torch.equal(p, u) for p, u in zip(plain, under, strict=True))


def test_a_compiled_function_refuses_second_derivatives():
    case = Case("selective_scan", "auto")
    compiled = torch.compile(scalar(case.operator), backend="aot_eager", fullgraph=True)
    given = case.given()
    grads = torch.autograd.grad(compiled(*given), given, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grads[0].sum(), given)


@pytest.mark.parametrize(
    "name, transform", [("selective_scan", "func.grad"), ("selective_scan", "func.jvp"), ("cross_scan", "func.grad")]
)
def test_compiled_transforms(name, transform):
    case, transform = Case(name, "auto"), transforms()[transform]
    directions = [t.cos() for t in case.tensors]
    want = transform(case.loop, tuple(case.tensors), tuple(directions))
    given = [t.detach() for t in case.given()]
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(transform, case.operator), backend="aot_eager", fullgraph=True)
    case.check(_flat(compiled(tuple(given), tuple(d.to(given[0].dtype) for d in directions))), _flat(want))
