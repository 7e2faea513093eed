"""Under autocast the step sizes of every mixer keep the precision that the operators promise."""

import copy

import pytest
import torch

from ssm_models.layers.bimamba import BiMamba
from ssm_models.layers.ss2d import SS2D
from ssm_models.layers.ss2d_xv import SS2DXv

C, R = 16, 2
IMAGES = [(SS2D, name) for name in ("v0", "v05", "v2_noz", "v051d", "v052d", "v052dc")]
IMAGES += [(SS2DXv, name) for name in ("xv1a", "xv3a")]
MIXERS = [*IMAGES, *((BiMamba, name) for name in ("none", "v1", "v2"))]


def mixer(kind, name, impl):
    """Step sizes are small differences of large numbers: half precision would lose them, a float32 product does not.

    All other weights are numbers of half precision, of a size that lets the step sizes matter, and nothing skips the
    scan.
    """
    option = {"bimamba_type" if kind is BiMamba else "forward_type": name}
    op = kind(C, d_state=2, dt_rank=R, impl=impl, **option)
    with torch.no_grad():
        for key, parameter in op.named_parameters():
            if key in ("Ds", "D", "D_b"):
                parameter.zero_()
            elif key in ("dt_proj.weight", "dt_proj_b.weight", "dt_projs_weight"):
                parameter[..., 0] = 64 + 0.2 * torch.randn(parameter.shape[:-1])
                parameter[..., 1] = -64
            elif "proj" in key and parameter.shape[-1] > 1 and parameter.dim() > 1 and "bias" not in key:
                parameter.copy_((torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5).bfloat16())
                dt = parameter[2 * C : -16].view(-1, R, C) if kind is SS2DXv and key.startswith("in") else parameter
                if key.startswith("x_proj") or dt is not parameter:
                    dt[..., 1, :] = dt[..., 0, :]  # both numbers that a step size is made of are the same
            else:
                parameter.copy_(parameter.bfloat16())
    return op


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind, name", MIXERS)
def test_step_sizes_stay_in_float32_under_autocast(kind, name, impl):
    op = mixer(kind, name, impl)
    x = torch.randn(*((2, 20) if kind is BiMamba else (2, 4, 5)), C).bfloat16()
    exact = copy.deepcopy(op).double()
    parameters = ("dt_proj.weight", "dt_proj.bias") if kind is BiMamba else ("dt_projs_weight", "dt_projs_bias")
    wanted = exact(x.double())
    wanted.square().mean().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x.float())
    y.float().square().mean().backward()

    def error(got, want):
        return float((got.double() - want).detach().norm() / want.detach().norm())

    assert error(y, wanted) < 2 * torch.finfo(torch.bfloat16).eps
    for key in parameters:
        assert error(op.get_parameter(key).grad, exact.get_parameter(key).grad) < 6 * torch.finfo(torch.bfloat16).eps
