"""What PyTorch's counter says of the operators, against counts by hand."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ssm_models  # noqa: F401  registers the formulas
import ssm_ops
from ssm_ops import causal_conv1d, cross_merge, cross_scan, flop_formulas, nc_ssd, selective_scan, ssd_chunk_scan
from ssm_ops.bidirectional_scan.impl.reference import composition as reversed_copies
from ssm_ops.ss2d_scan.impl.reference import composition
from ssm_ops.ssd.impl import reference as ssd_reference

OPS = torch.ops.ssm_ops


def count(run, convention: str | None = None) -> int:
    with FlopCounterMode(display=False, custom_mapping=convention and flop_formulas(convention)) as counter:
        run()
    return counter.get_total_flops()


def forward_and_backward(call, convention: str | None = None) -> tuple[int, int]:
    """FLOPs of `call` and of the backward pass of its result."""
    outs = []
    forward = count(lambda: outs.append(call()), convention)
    return forward, count(lambda: outs[0].sum().backward(), convention)


def leaf(*shape: int) -> torch.Tensor:
    return torch.rand(shape, requires_grad=True)


# ---- one recurrence, one number at a time ---------------------------------------------------------------------------


class Counted:
    """A number that counts the multiplications and additions in which it takes part."""

    operations = 0

    def __init__(self, value: float):
        self.value = value

    def __mul__(self, other: "Counted") -> "Counted":
        Counted.operations += 1
        return Counted(self.value * other.value)

    def __add__(self, other: "Counted") -> "Counted":
        Counted.operations += 1
        return Counted(self.value + other.value)

    def exp(self) -> "Counted":
        return Counted(math.exp(self.value))


def numbers(x: torch.Tensor) -> list[Counted]:
    return [Counted(v) for v in x.flatten().tolist()]


def scan_by_hand(u, dt, A, B, C, dy):
    """The recurrence of one channel, forward and backward: y, (du, ddt, dA, dB, dC), and the operations of both.

    u, dt, dy: L numbers, A: N, B, C: L lists of N.
    """
    length, n_state = len(u), len(A)
    zeros = lambda: [Counted(0.0) for _ in range(n_state)]  # noqa: E731

    def step(t, h):
        decay = [(dt[t] * A[n]).exp() for n in range(n_state)]
        return decay, [decay[n] * h[n] + dt[t] * u[t] * B[t][n] for n in range(n_state)]

    Counted.operations = 0
    h, y = zeros(), []
    for t in range(length):
        _, h = step(t, h)
        total = Counted(0.0)
        for n in range(n_state):
            total = total + C[t][n] * h[n]
        y.append(total)
    forward = Counted.operations

    Counted.operations = 0
    hs, decays = [zeros()], []
    for t in range(length):
        decay, h = step(t, hs[-1])
        decays.append(decay)
        hs.append(h)
    g, after, dA = zeros(), zeros(), zeros()
    du, ddt, dB, dC = [], [], [], []
    for t in reversed(range(length)):
        g = [dy[t] * C[t][n] + after[n] * g[n] for n in range(n_state)]
        after = decays[t]
        of_decay = [g[n] * decays[t][n] * hs[t][n] for n in range(n_state)]
        g_B, of_dt = Counted(0.0), Counted(0.0)
        for n in range(n_state):
            g_B, of_dt = g_B + g[n] * B[t][n], of_dt + of_decay[n] * A[n]
            dA[n] = dA[n] + of_decay[n] * dt[t]
        dt_u = dt[t] * u[t]
        # with more channels these two are sums over channels: an addition each
        dB.insert(0, [Counted(0.0) + g[n] * dt_u for n in range(n_state)])
        dC.insert(0, [Counted(0.0) + dy[t] * hs[t + 1][n] for n in range(n_state)])
        du.insert(0, dt[t] * g_B)
        ddt.insert(0, of_dt + g_B * u[t])
    return y, (du, ddt, dA, sum(dB, []), sum(dC, [])), forward, Counted.operations


def test_recurrence_costs_what_the_loop_does():
    """The growth of both counts with the state: terms that do not grow with it are not counted."""
    length, costs = 5, []
    for n_state in (2, 3):
        x = {name: torch.rand(length, dtype=torch.float64, requires_grad=True) for name in ("u", "dt", "dy")}
        A = (-torch.rand(1, n_state, dtype=torch.float64)).requires_grad_()
        B, C = (torch.rand(1, 1, n_state, length, dtype=torch.float64, requires_grad=True) for _ in range(2))
        per_token = [[numbers(t) for t in m[0, 0].t()] for m in (B, C)]
        y, grads, *operations = scan_by_hand(
            numbers(x["u"]), numbers(x["dt"]), numbers(A), *per_token, numbers(x["dy"])
        )
        costs.append(operations)
        out = selective_scan(x["u"].view(1, 1, -1), x["dt"].view(1, 1, -1), A, B, C)
        assert out.flatten().tolist() == pytest.approx([v.value for v in y])
        wanted = torch.autograd.grad(out.flatten() @ x["dy"], (x["u"], x["dt"], A, B, C))
        for got, want in zip(grads, (*wanted[:3], wanted[3][0, 0].t(), wanted[4][0, 0].t()), strict=True):
            assert [v.value for v in got] == pytest.approx(want.flatten().tolist())
    growth = [(large - small) / length for small, large in zip(*costs, strict=True)]
    assert growth == [7, 20]


# ---- the formulas ---------------------------------------------------------------------------------------------------

BATCH, D, L, N = 2, 6, 5, 3
TOKENS, STATES = BATCH * D * L, BATCH * D * L * N


@pytest.mark.parametrize(
    "skip, gate, convention, forward, backward",
    [
        (False, False, None, 18 * STATES, 42 * STATES),
        (False, False, "hardware_aware", 18 * STATES, 42 * STATES),
        (False, False, "recurrence", 7 * STATES, 20 * STATES),
        (True, False, None, 18 * STATES + 2 * TOKENS, 42 * STATES + 4 * TOKENS),
        (True, True, None, 18 * STATES + 4 * TOKENS, 44 * STATES + 10 * TOKENS),
        (False, True, "recurrence", 7 * STATES + 2 * TOKENS, 22 * STATES + 4 * TOKENS),
    ],
)
def test_selective_scan(skip, gate, convention, forward, backward):
    parts = {"D": leaf(D) if skip else None, "z": leaf(BATCH, D, L) if gate else None}
    args = leaf(BATCH, D, L), leaf(BATCH, D, L), leaf(D, N), leaf(BATCH, 2, N, L), leaf(BATCH, 2, N, L)
    got = forward_and_backward(lambda: selective_scan(*args, **parts), convention)
    assert got == (forward, backward)


def test_published_count_of_a_scan_is_half():
    """Mamba's and VMamba's 9 B L D N + B D L MACs, of the first block of vmamba_tiny_s1l8: 4 routes of 96 channels."""
    shapes = [(1, 384, 3136), (1, 384, 3136), (384, 1), (1, 4, 1, 3136), (1, 4, 1, 3136), (384,), None]
    flops = flop_formulas()[OPS.selective_scan_fwd](*shapes, out_shape=None)
    assert flops / 2 == 9 * 3136 * 384 + 3136 * 384


@pytest.mark.parametrize("convention", ["hardware_aware", "recurrence"])
def test_ss2d_scan_costs_what_its_composition_costs(convention):
    height, width, rank = 5, 7, 2
    x, proj = leaf(BATCH, D, height, width), leaf(BATCH, height, width, 4 * (rank + 2 * N))
    parameters = leaf(4, D, rank), leaf(4 * D, N), leaf(4 * D), leaf(4 * D)
    call = lambda: composition(x, proj, *parameters, "cross2d", torch.float32, "auto")  # noqa: E731
    forward, backward = forward_and_backward(call, convention)

    # the fused operator, which this machine may not have, on tensors without memory
    x, proj, *parameters = (t.detach().to("meta") for t in (x, proj, *parameters))
    outs = []
    rest = "cross2d", torch.float32, True, "cpu"
    fused = count(lambda: outs.extend(OPS.ss2d_scan_fwd(x, proj, *parameters, *rest)), convention)
    fused_backward = count(lambda: OPS.ss2d_scan_bwd(x, x, proj, *parameters, outs[1], "cross2d", "cpu"), convention)
    product = 2 * BATCH * 4 * D * height * width * rank
    per_state = {"hardware_aware": (18, 42), "recurrence": (7, 20)}[convention]
    tokens = BATCH * 4 * D * height * width
    assert fused == forward == product + tokens * (per_state[0] * N + 2)
    # the composition keeps the step sizes, the fused operator computes them again
    assert fused_backward - product == backward == 2 * product + tokens * (per_state[1] * N + 4)


@pytest.mark.parametrize("convention", ["hardware_aware", "recurrence"])
def test_bidirectional_scan_costs_what_its_composition_costs(convention):
    length, rank = 7, 2
    inputs = leaf(BATCH, length, D), leaf(BATCH, length, D), leaf(BATCH, length, 2 * (rank + 2 * N))
    parameters = leaf(2, D, rank), leaf(2 * D, N), leaf(2 * D), leaf(2 * D)
    call = lambda: reversed_copies(*inputs, *parameters, torch.float32, "auto")  # noqa: E731
    forward, backward = forward_and_backward(call, convention)

    made, outs = [t.detach().to("meta") for t in (*inputs, *parameters)], []
    fused = count(lambda: outs.extend(OPS.bidirectional_scan_fwd(*made, torch.float32, True, "cpu")), convention)
    fused_backward = count(lambda: OPS.bidirectional_scan_bwd(outs[0], *made, outs[1], "cpu"), convention)
    product, tokens = 2 * BATCH * 2 * D * length * rank, BATCH * 2 * D * length
    per_state = {"hardware_aware": (18, 42), "recurrence": (7, 20)}[convention]
    assert fused == forward == product + tokens * (per_state[0] * N + 2)
    assert fused_backward - product == backward == 2 * product + tokens * (per_state[1] * N + 4)


@pytest.mark.parametrize("length, chunk", [(24, 8), (21, 8), (5, 8)])
@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_costs_the_products_of_its_reference(length, chunk, groups):
    heads, head_dim, n_state = 4, 3, 5
    args = (
        leaf(BATCH, length, heads, head_dim),
        leaf(BATCH, length, heads),
        leaf(heads),
        leaf(BATCH, length, groups, n_state),
        leaf(BATCH, length, groups, n_state),
    )
    D, outs = leaf(heads), []
    # plain PyTorch: its own formulas count the products
    inputs = [t.detach() for t in (*args, D)]
    forward = count(lambda: outs.extend(ssd_reference.forward(*inputs, None, None, False, chunk, torch.float32)))
    out, final, saved = outs
    backward = count(lambda: ssd_reference.backward(out, final, *inputs, None, None, saved, False, chunk))
    run = lambda: ssd_chunk_scan(*args, chunk, D=D)  # noqa: E731
    assert forward_and_backward(run) == (forward, backward) and backward > forward > 0
    states = BATCH * length * heads * head_dim * n_state
    assert forward_and_backward(run, "recurrence") == (6 * states, 15 * states)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("convention", ["hardware_aware", "recurrence"])
def test_nc_ssd_costs_the_products_of_its_reference(groups, convention):
    heads, head_dim, n_state = 4, 3, 5
    args = (
        leaf(BATCH, L, heads, head_dim),
        leaf(BATCH, L, heads),
        leaf(heads),
        leaf(BATCH, L, groups, n_state),
        leaf(BATCH, L, groups, n_state),
    )
    run = lambda impl: lambda: nc_ssd(*args, D=leaf(heads), impl=impl)  # noqa: E731
    macs = BATCH * L * heads * head_dim * n_state
    assert forward_and_backward(run("reference")) == (2 * 2 * macs, 2 * 4 * macs)
    assert forward_and_backward(run("auto"), convention) == (2 * 2 * macs, 2 * 4 * macs)


@pytest.mark.parametrize("activation, backward", [(None, 2), ("silu", 3)])
def test_causal_conv1d(activation, backward):
    x, weight = leaf(BATCH, D, L), leaf(D, 4)
    got = forward_and_backward(lambda: causal_conv1d(x, weight, leaf(D), activation=activation))
    macs = BATCH * D * L * 4
    assert got == (2 * macs, backward * 2 * macs)


def test_moves_are_free():
    x = leaf(BATCH, D, 5, 7)
    with FlopCounterMode(display=False) as counter:
        cross_merge(cross_scan(x).unflatten(3, (5, 7))).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.cross_scan] == counts[OPS.cross_merge] == counter.get_total_flops() == 0


# ---- registration ---------------------------------------------------------------------------------------------------


def test_every_operator_has_a_formula():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ssm_ops::")}
    assert {str(packet).replace(".", "::") for packet in flop_formulas()} == names


def small_scan() -> tuple[torch.Tensor, ...]:
    return leaf(1, 2, 5), leaf(1, 2, 5), leaf(2, 1), leaf(1, 1, 5), leaf(1, 1, 5)


def test_a_convention_given_to_one_counter_is_not_another_ones():
    counts = [count(lambda: selective_scan(*small_scan()), c) for c in (None, "recurrence", None)]
    assert counts == [180, 70, 180]


def test_unknown_convention_is_named():
    with pytest.raises(ValueError, match="convention='naive' is not one of hardware_aware, recurrence"):
        ssm_ops.flop_formulas("naive")


COUNT = """
import sys, torch, ssm_ops
early = {"torch.utils.flop_counter", "triton"} & set(sys.modules)
from torch.utils.flop_counter import FlopCounterMode
ssm_ops.register_flop_formulas()
x = torch.ones(1, 2, 5)
with FlopCounterMode(display=False) as counter:
    ssm_ops.selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1])
print(early, counter.get_total_flops())
"""


def test_pytorchs_counter_knows_the_operators_once_registered():
    """`import ssm_ops` leaves the counter alone, which would import triton; `import ssm_models`, above, registers."""
    assert count(lambda: selective_scan(*small_scan())) == 180
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set() 180\n"), done.stderr
