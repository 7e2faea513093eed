"""The two forms of the reference's recurrence, which export and all else take, against a loop of three lines."""

import pytest
import torch

from ssm_ops.selective_scan.impl.reference import _recurrence_by_doubling, linear_recurrence


@pytest.mark.parametrize("length", [1, 2, 7, 49, 63, 196, 1024])
def test_both_forms_equal_a_loop(length):
    decay = -torch.rand(length, 3, 2, dtype=torch.float64) * 4
    x, h = torch.randn(length, 3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    expected, state = [], h
    for t in range(length):
        state = decay[t].exp() * state + x[t]
        expected.append(state)
    doubled = _recurrence_by_doubling(decay.exp(), x, h)
    torch.testing.assert_close(doubled, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(linear_recurrence(decay, x.clone(), h), doubled, rtol=1e-12, atol=1e-12)


def test_graphs_for_export_grow_slowly():
    """A number of operations that grows with the logarithm of the length, not with its root."""
    from ssm_ops import selective_scan

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True, impl="reference")

    def nodes(length):
        u, B = torch.randn(1, 4, length), torch.randn(1, 2, length)
        return len(torch.export.export(Scan(), (u, u, -torch.rand(4, 2), B, B)).graph.nodes)

    assert nodes(1024) < nodes(64) + 80
