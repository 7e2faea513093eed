"""Second derivatives of models: a step with a gradient penalty (Gulrajani et al. 2017, "WGAN-GP"), and the Hessian."""

import pytest
import timm
import torch
from torch.autograd import functional

import ssm_models  # noqa: F401
from tests.kernels.common import rms_error

NANO = pytest.mark.parametrize("name", ["vmamba_nano", "vim_nano", "vssd_nano"])


@pytest.fixture
def written_out():
    """Attention by its formula: PyTorch's fused kernels have no second derivative."""
    timm.layers.set_fused_attn(False)
    yield
    timm.layers.set_fused_attn(True)


def critic(name, impl, dtype):
    torch.manual_seed(1)
    size = {"img_size": 32} if name == "vim_nano" else {}
    return timm.create_model(name, num_classes=1, drop_path_rate=0.0, scan_impl=impl, **size).to(dtype)


def step(model, images):
    """Loss of the critic and gradients of its parameters."""
    images = images.to(next(model.parameters()).dtype).requires_grad_()
    score = model(images).sum()
    (slope,) = torch.autograd.grad(score, images, create_graph=True)
    loss = score + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
    model.zero_grad()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@NANO
def test_gradient_penalty(name, written_out):
    images = torch.randn(2, 3, 32, 32)
    want_loss, want = step(critic(name, "reference", torch.float64), images)
    for impl, dtype, bound in (("auto", torch.float32, 1e-3), ("auto", torch.float64, 1e-9)):
        loss, got = step(critic(name, impl, dtype), images)
        assert got.keys() == want.keys() and len(got) > 20
        torch.testing.assert_close(loss.double(), want_loss, rtol=bound, atol=bound)
        assert max(rms_error(got[n], want[n]) for n in got if want[n].norm() > 1e-8) < bound


@NANO
def test_hessian_vector_product_by_finite_differences(name, written_out):
    model = critic(name, "auto", torch.float64).eval()
    images, direction = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    function = lambda x: model(x).sin().sum()  # noqa: E731
    _, product = functional.hvp(function, images, direction)
    step = 1e-7  # small, because of the kinks of ReLU
    there, back = (functional.vjp(function, images + h * direction)[1] for h in (step, -step))
    difference = (there - back) / (2 * step)
    assert difference.norm() > 1e-6 and rms_error(product, difference) < 1e-5


def test_fused_attention_refuses_second_derivatives():
    with pytest.raises(RuntimeError, match="attention.* is not implemented"):
        step(critic("vssd_nano", "auto", torch.float32), torch.randn(2, 3, 32, 32))


def test_attention_written_out_has_the_same_logits(written_out):
    plain = critic("vssd_nano", "auto", torch.float64).eval()
    timm.layers.set_fused_attn(True)
    fused, images = critic("vssd_nano", "auto", torch.float64).eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(plain(images), fused(images), rtol=1e-12, atol=1e-12)
