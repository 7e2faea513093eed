"""The blocks for other networks: the zoo's numbers, the published arguments, and the examples of docs/blocks.md."""

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import LayerNorm2d

from ssm_models import NCSSD, SS2D, VSSM, Mamba, VisionMamba, VSSBlock
from ssm_models.vssm import VARIANTS
from tests.models.golden import fill_model

DOC = Path(__file__).parents[2] / "docs" / "blocks.md"
SMALL = {"depths": (1,), "dims": 16, "num_classes": 2, "drop_path_rate": 0.0}


def of_zoo(**arguments) -> nn.Module:
    """The block of a small VMamba, with weights that are not its initial ones."""
    return fill_model(VSSM(**SMALL, **arguments)).layers[0].blocks[0].eval()


def same(block: nn.Module, expected: nn.Module, x: torch.Tensor, theirs: torch.Tensor | None = None) -> None:
    """The keys, and with the weights the numbers, of `expected`; to which x is given as `theirs`."""
    block.load_state_dict(expected.state_dict(), strict=True)
    got = block.eval()(x)
    if theirs is None:
        assert torch.equal(got, expected(x))
    else:  # another layout, in which sums are formed in another order
        torch.testing.assert_close(got, expected(theirs).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)


FIRST = {"forward_type": "v0", "mlp_ratio": 0.0, "norm_layer": "ln"}


@pytest.mark.parametrize("d_state", [16, 4])
def test_the_first_published_block_is_that_of_the_zoo(d_state):
    block = VSSBlock(hidden_dim=16, drop_path=0.1, norm_layer=nn.LayerNorm, attn_drop_rate=0.0, d_state=d_state)
    expected, x = of_zoo(**FIRST, ssm_d_state=d_state), torch.randn(2, 5, 7, 16)
    same(block, expected, x)
    same(VSSBlock(16, 0.1, nn.LayerNorm, 0.0, d_state), expected, x)
    first = VSSBlock(hidden_dim=16, norm_layer=nn.LayerNorm, d_state=d_state, channel_first=True)
    same(first, expected, x.permute(0, 3, 1, 2).contiguous(), x)
    names = {"norm.": "ln_1.", "op.": "self_attention."}
    old = {re.sub(r"^(norm|op)\.", lambda m: names[m[0]], key): value for key, value in expected.state_dict().items()}
    assert {key.split(".")[0] for key in old} == {"ln_1", "self_attention"}
    net = nn.ModuleDict({"a": VSSBlock(hidden_dim=16, norm_layer=nn.LayerNorm, d_state=d_state)})
    net.load_state_dict({f"a.{key}": value for key, value in old.items()}, strict=True)
    assert torch.equal(net.eval()["a"](x), expected(x))


def test_published_defaults_of_both_blocks():
    first, second = VSSBlock(hidden_dim=32), VSSBlock(hidden_dim=32, ssm_ratio=2.0)
    assert (first.norm.eps, second.norm.eps, first.has_mlp, second.has_mlp) == (1e-6, 1e-5, False, True)
    assert first.op.A_logs.shape == second.op.A_logs.shape == (256, 16) and second.mlp.fc1.out_features == 128
    assert VSSBlock(hidden_dim=32, attn_drop_rate=0.3, drop_path=0.2).op.dropout.p == 0.3
    assert VSSBlock(hidden_dim=32, drop_path=0.2).drop_path.drop_prob == 0.2
    assert VSSBlock(hidden_dim=32, expand=1.0, dt_rank=5).op.dt_projs_weight.shape == (4, 32, 5)


@pytest.mark.parametrize("forward_type", ["v05_noz", "v2", "xv1a_act", "m0_noz"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_the_later_block_is_that_of_the_zoo(forward_type, channel_first):
    arguments = {"ssm_d_state": 4, "ssm_ratio": 1.0, "ssm_conv_bias": False, "mlp_ratio": 2.0}
    acts = {} if forward_type.startswith("xv") else {"ssm_act_layer": nn.GELU}
    block = VSSBlock(
        hidden_dim=16,
        drop_path=0.1,
        norm_layer=LayerNorm2d if channel_first else nn.LayerNorm,
        channel_first=channel_first,
        forward_type=forward_type,
        mlp_act_layer=nn.ReLU,
        gmlp=True,
        ssm_init="v2",
        **arguments,
        **acts,
    )
    names = {"mlp_act_layer": "relu", "gmlp": True} | dict.fromkeys(acts, "gelu")
    expected = of_zoo(norm_layer="ln2d" if channel_first else "ln", forward_type=forward_type, **arguments, **names)
    block.norm.eps = block.norm2.eps = 1e-5  # timm's LayerNorm2d has 1e-6
    same(block, expected, torch.randn(2, 16, 5, 7) if channel_first else torch.randn(2, 5, 7, 16))


def test_mixers_are_those_of_the_zoo():
    x, expected = torch.randn(2, 5, 7, 16), of_zoo(**FIRST).op
    same(SS2D(d_model=16, d_state=16, expand=2, dropout=0.0), expected, x)
    same(SS2D(16, act_layer=nn.SiLU, channel_first=True), expected, x.permute(0, 3, 1, 2).contiguous(), x)

    vim = fill_model(VisionMamba(img_size=32, depth=1, embed_dim=16, num_classes=2)).eval().layers[0].mixer
    tokens = x.flatten(1, 2)
    mamba = Mamba(d_model=16, d_state=16, d_conv=4, expand=2)
    same(mamba, vim, tokens)
    assert torch.equal(mamba(x), vim(tokens).unflatten(1, (5, 7)))
    assert not torch.equal(Mamba(16, bimamba_type="none")(x), x)

    vssd = fill_model(timm.create_model("vssd_nano")).eval().layers[0].blocks[0].attn
    maps = torch.randn(2, 5, 7, 32)
    arguments = {"d_model": 32, "d_state": 16, "headdim": 32}
    same(NCSSD(**arguments), vssd, maps)
    same(NCSSD(**arguments, channel_first=True), vssd, maps.permute(0, 3, 1, 2).contiguous(), maps)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize(
    "norm_layer, eps",
    [(None, 1e-6), (nn.LayerNorm, 1e-5), (partial(nn.LayerNorm, eps=1e-3), 1e-3), ("of the layout", 1e-5)],
    ids=["default", "class", "partial", "name"],
)
def test_norms_are_over_the_channels(norm_layer, eps, channel_first):
    given = ("ln2d" if channel_first else "ln") if norm_layer == "of the layout" else norm_layer
    block = VSSBlock(hidden_dim=8, norm_layer=given, channel_first=channel_first)
    x, channels = 1e-2 * torch.randn(2, 8, 4, 6), 1
    if not channel_first:
        x, channels = x.permute(0, 2, 3, 1), 3
    centred = x - x.mean(channels, keepdim=True)
    expected = centred * (centred.square().mean(channels, keepdim=True) + eps).rsqrt()
    torch.testing.assert_close(block.norm(x), expected)
    assert block(x).shape == x.shape


def test_any_constructor_is_a_norm():
    block = VSSBlock(hidden_dim=8, norm_layer=partial(nn.GroupNorm, 4), channel_first=True)
    assert block.norm.num_groups == 4 and block(torch.randn(2, 8, 4, 6)).shape == (2, 8, 4, 6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"hiden_dim": 8}, TypeError, "hiden_dim"),
        ({"hidden_dim": 8, "attn_drop": 0.1}, TypeError, "attn_drop"),
        (
            {"hidden_dim": 8, "d_state": 4, "mlp_ratio": 2.0},
            TypeError,
            "d_state of the first published block beside mlp_ratio of the second; the second has ssm_d_state",
        ),
        ({"hidden_dim": 8, "forward_type": "v9"}, ValueError, "forward_type='v9' is not known"),
        ({"hidden_dim": 8, "ssm_act_layer": nn.Tanh}, ValueError, "Tanh'> is neither nn.SiLU, nn.GELU"),
        (
            {"hidden_dim": 8, "norm_layer": "ln2d"},
            ValueError,
            "norm_layer='ln2d' is not for channel_first=False",
        ),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        VSSBlock(**arguments)


def test_mistakes_in_mixers_are_named():
    with pytest.raises(TypeError, match="ssm_ratio=1.0 and expand=2 are two names of one number"):
        SS2D(16, ssm_ratio=1.0, expand=2)
    for kind in (SS2D, Mamba, NCSSD):
        with pytest.raises(TypeError, match="d_sate"):
            kind(16, d_sate=4)


@pytest.mark.parametrize("kind", [VSSBlock, SS2D])
def test_device_and_dtype(kind):
    parameters = list(kind(8, device="meta", dtype=torch.bfloat16).parameters())
    assert {(p.device.type, p.dtype) for p in parameters} == {("meta", torch.bfloat16)}


def test_recomputed_blocks():
    x = torch.randn(1, 4, 4, 8, requires_grad=True)
    block = VSSBlock(hidden_dim=8, use_checkpoint=True)
    (grad,) = torch.autograd.grad(block(x).sum(), x)
    block.use_checkpoint = False
    torch.testing.assert_close(torch.autograd.grad(block(x).sum(), x)[0], grad)


def test_arguments_of_the_later_block_are_those_of_the_models():
    """Every option of a model's blocks can be given to a block by itself."""
    block, model = (set(inspect.signature(kind).parameters) for kind in (VSSBlock, VSSM))
    of_blocks = {name for name in model if name.startswith(("ssm_", "mlp_"))} | {"forward_type", "gmlp", "norm_layer"}
    assert of_blocks - {"ssm_initial_state"} <= block
    assert set(VARIANTS["vmamba_tiny_s1l8"]) - block == {
        "depths", "dims", "drop_path_rate", "downsample_version", "patchembed_version",
    }  # fmt: skip


def test_the_documented_examples_run():
    namespace = {}
    network, training, weights = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    exec(network, namespace)
    net = namespace["MambaUNet"](3)
    logits = net(torch.randn(2, 3, 20, 28))
    assert logits.shape == (2, 3, 20, 28)
    exec(training, namespace)
    losses, model = namespace["losses"], namespace["model"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    exec(weights, namespace)
    x, block = torch.randn(1, 6, 6, 96), namespace["block"].eval()
    assert torch.equal(block(x), namespace["trained"].eval().layers[0].blocks[0](x))
