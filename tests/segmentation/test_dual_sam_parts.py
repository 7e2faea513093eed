"""Parts of Dual-SAM: parameters as published, formulas against plain computations, and what `legacy` changes."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segmentation.dual_sam.adapter import AdaptedMlp
from segmentation.dual_sam.connectivity import connectivity
from segmentation.dual_sam.decoder import ChannelAttention, FusionDecoder
from segmentation.dual_sam.gamma import gamma_copy
from segmentation.dual_sam.lora import LoRAQKV
from segmentation.dual_sam.loss import connectivity_loss, mutual_loss, mutual_weight
from segmentation.dual_sam.prompt import CoupledPrompt, PromptLevel
from segmentation.dual_sam.sam import SAMEncoder
from ssm_train.common.errors import UserError

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "neck_chans": 16, "window_size": 3, "global_attn_indexes": (1, 3)}


def parameters(module, trained=False):
    return sum(value.numel() for value in module.parameters() if value.requires_grad or not trained)


def test_parameters_are_the_published():
    with torch.device("meta"):
        encoder, prompt = SAMEncoder(), CoupledPrompt([768] * 4)
        decoder = FusionDecoder([768] * 4, [3, 2, 1, 0])
    blocks = encoder.sam.blocks
    lora = sum(parameters(block.attn.qkv, trained=True) for block in blocks)
    adapters = [sum(parameters(getattr(block.mlp, view)) for block in blocks) for view in ("image", "gamma")]
    assert (lora, *adapters) == (147_456, 912_960, 912_960)
    assert parameters(encoder, trained=True) == 147_456 + 2 * 912_960
    assert parameters(encoder) - parameters(encoder, trained=True) == 87_278_848
    assert parameters(prompt.embed) + prompt.pos_embed.numel() == 1_377_024
    gates = [level.gates.numel() for level in prompt.levels]
    assert gates == [2] * 4 and sum(map(parameters, prompt.levels)) - 8 == 61_412_352
    assert 2 * parameters(decoder) == 9_539_580


def test_encoder_is_that_of_the_facts():
    with torch.device("meta"):
        sam = SAMEncoder().sam
    assert {layer.eps for block in sam.blocks for layer in (block.norm1, block.norm2)} == {1e-6}
    assert [i for i, block in enumerate(sam.blocks) if block.window_size == 0] == [2, 5, 8, 11]
    assert sam.pos_embed.shape == (1, 32, 32, 768)
    assert [tuple(sam.blocks[i].attn.rel_pos_h.shape) for i in (0, 2)] == [(27, 64), (63, 64)]


def test_lora_adds_to_q_and_v():
    layer, x = torch.nn.Linear(6, 18), torch.randn(2, 5, 6)
    lora = LoRAQKV(layer, rank=2)
    assert torch.equal(lora(x), layer(x))  # as it was, at first
    for part in (lora.b_q, lora.b_v):
        torch.nn.init.normal_(part.weight)
    q, k, v = (lora(x) - layer(x)).chunk(3, dim=-1)
    assert torch.allclose(q, x @ lora.a_q.weight.T @ lora.b_q.weight.T, atol=1e-5)
    assert torch.allclose(v, x @ lora.a_v.weight.T @ lora.b_v.weight.T, atol=1e-5)
    assert not k.any()


def test_every_view_has_its_adapter():
    mlp = AdaptedMlp(torch.nn.Identity(), dim=8, hidden=3)
    x = torch.randn(4, 5, 8)
    for view, part, out in zip((mlp.image, mlp.gamma), x.chunk(2), mlp(x).chunk(2), strict=True):
        inner = F.layer_norm(part, (8,)) @ view.down.weight.T + view.down.bias
        expected = part + (inner * torch.sigmoid(1.702 * inner)) @ view.up.weight.T + view.up.bias
        assert torch.allclose(out, expected, atol=1e-5)


def test_encoder_gives_a_map_per_quarter_and_the_neck_s():
    encoder = SAMEncoder(img_size=64, lora_rank=2, adapter_dim=4, model_args=TINY).eval()
    maps = encoder(torch.randn(2, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(2, 32, 4, 4)] * 4 + [(2, 16, 4, 4)]
    assert [x.shape[-2:] for x in encoder(torch.randn(2, 3, 96, 48))] == [(6, 3)] * 5
    # the views differ by their adapters alone
    same = encoder(torch.randn(1, 3, 64, 64).repeat(2, 1, 1, 1))
    assert not torch.allclose(*same[0])


def sam_file(path, side=8):
    """Weights of SAM by SAM's own names, for images of 16 * side pixels."""
    small = SAMEncoder(img_size=16 * side, model_args=TINY).sam
    own = {name: value for name, value in small.state_dict().items() if ".a_" not in name and ".b_" not in name}
    weights = {}
    for name, value in own.items():
        if ".mlp.image." in name or ".mlp.gamma." in name:
            continue
        name = name.replace("mlp.mlp.fc", "mlp.lin").replace("qkv.qkv.", "qkv.")
        weights[f"image_encoder.{name}"] = torch.randn_like(value)
    weights["prompt_encoder.no_mask_embed.weight"] = weights["mask_decoder.mask_tokens.weight"] = torch.zeros(1, 4)
    torch.save(weights, path)
    return weights


def test_sam_s_own_weights_are_resized(tmp_path):
    weights = sam_file(tmp_path / "sam.pth", side=8)
    sam = SAMEncoder(tmp_path / "sam.pth", img_size=64, model_args=TINY).sam
    position = weights["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    # from 8 to 4, bilinear is the mean of the middle two
    assert torch.allclose(sam.pos_embed.permute(0, 3, 1, 2), F.avg_pool2d(position, 2), atol=1e-6)
    relative = weights["image_encoder.blocks.1.attn.rel_pos_h"]
    expected = F.interpolate(relative.T[None], 7, mode="linear", align_corners=False)[0].T
    assert torch.allclose(sam.blocks[1].attn.rel_pos_h, expected, atol=1e-6)
    assert torch.equal(sam.blocks[0].attn.rel_pos_h, weights["image_encoder.blocks.0.attn.rel_pos_h"])
    assert torch.equal(sam.blocks[2].mlp.mlp.fc1.weight, weights["image_encoder.blocks.2.mlp.lin1.weight"])
    assert not any(value.requires_grad for name, value in sam.named_parameters() if name.startswith("neck"))


def test_weights_that_are_not_sam_s(tmp_path):
    weights = sam_file(tmp_path / "sam.pth")
    del weights["image_encoder.neck.0.weight"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part.pth does not fit SAM's encoder: missing neck.0.weight"):
        SAMEncoder(tmp_path / "part.pth", img_size=64, model_args=TINY)
    with pytest.raises(UserError, match="none.pth is not a file"):
        SAMEncoder(tmp_path / "none.pth", img_size=64, model_args=TINY)
    with pytest.raises(UserError, match="is frozen: --cfg-options model.backbone.checkpoint="):
        SAMEncoder(img_size=64, model_args=TINY).init_weights()
    SAMEncoder(img_size=64, frozen=False, model_args=TINY).init_weights()


# ---- prompt ----


def plain_level(level, prompt, image, gamma, scrambled):
    """The level from its formulas, one image at a time, for maps of the prompt's channels and grid."""
    outs = []
    for p_map, a_map, b_map in zip(prompt, image, gamma, strict=True):
        grid = p_map.shape[1:]
        p, a, b = (x.flatten(1).T for x in (p_map, a_map, b_map))
        p = p + level.attn(level.norm1(p)[None])[0]
        p = p + level.mlp_prompt(level.norm2(p))
        values = level.norm1(p)
        if scrambled:
            values = values.reshape(values.shape[1], values.shape[0]).T
        q, k, v = level.cross.q(level.norm1(a)), level.cross.k(level.norm1(b)), level.cross.v(values)
        heads = []
        for head in range(level.cross.heads):
            width = q.shape[1] // level.cross.heads
            part = slice(head * width, (head + 1) * width)
            heads.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(-1) @ v[:, part])
        c = p + level.cross.proj(torch.cat(heads, dim=1))
        c = (c + level.mlp_cross(level.norm2(c))).T.unflatten(1, grid)[None]
        outs.append((p.T.unflatten(1, grid), a_map, b_map, level.to_image(c)[0], level.to_gamma(c)[0]))
    p, a, b, alpha, beta = (torch.stack(each) for each in zip(*outs, strict=True))
    return p, a + level.gates[0] * alpha, b + level.gates[1] * beta


@pytest.mark.parametrize("legacy", [False, True])
def test_level_of_the_prompt(legacy):
    level = PromptLevel(16, 16, (4, 2), legacy).eval()
    level.gates.data = torch.tensor([0.7, -1.3])
    inputs = [torch.randn(2, 16, 3, 5) for _ in range(3)]
    with torch.no_grad():
        expected, other = (plain_level(level, *inputs, scrambled) for scrambled in (legacy, not legacy))
        found = level(*inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(found[1], other[1], atol=1e-2)


def test_gates_are_trained_and_saved_unless_legacy():
    level = PromptLevel(8, 8, (2, 2))
    inputs = [torch.randn(2, 8, 2, 2) for _ in range(3)]
    sum(x.sum() for x in level(*inputs)).backward()
    assert level.gates.grad.abs().min() > 0 and "gates" in level.state_dict()
    old = PromptLevel(8, 8, (2, 2), legacy=True)
    assert "gates" not in old.state_dict() and not any("gates" in name for name, _ in old.named_parameters())


def test_prompt_takes_maps_of_any_channels_and_size():
    prompt = CoupledPrompt([4, 6], dim=8, img_size=32, patch_size=8, heads=(2, 2))
    maps = [torch.randn(2, 4, 20, 12), torch.randn(2, 6, 2, 2)]
    image, gamma = prompt(torch.randn(2, 3, 40, 24), maps, maps)
    # the gates are zero: training begins with the maps of the encoder
    assert all(torch.equal(a, b) for a, b in zip([*image, *gamma], maps * 2, strict=True))
    for level in prompt.levels:
        level.gates.data.fill_(1)
    image, _ = prompt(torch.randn(2, 3, 40, 24), maps, maps)
    assert [x.shape for x in image] == [x.shape for x in maps] and not torch.allclose(image[0], maps[0])


# ---- decoder, losses, gamma ----


def test_decoder_doubles_every_level():
    decoder = FusionDecoder([5, 6, 7, 8], [3, 2, 1, 0], bottom_channels=9, channels=(4, 6, 8, 16))
    maps = [torch.randn(2, channels, 2, 3) for channels in (5, 6, 7, 8)]
    logits = decoder(maps, torch.randn(2, 9, 2, 3))
    assert [tuple(x.shape) for x in logits] == [(2, 8, 32 >> level, 48 >> level) for level in range(4)]
    with pytest.raises(UserError, match="not of the same levels"):
        FusionDecoder([5, 6], [1, 1, 1])


def test_channel_attention():
    attention, x = ChannelAttention(32), torch.randn(2, 32, 3, 4)
    first, second = attention.gate[0], attention.gate[2]

    def f(pooled):
        hidden = (pooled @ first.weight.flatten(1).T + first.bias).clamp(min=0)
        return hidden @ second.weight.flatten(1).T + second.bias

    weight = torch.sigmoid(f(x.mean((2, 3))) + f(x.amax((2, 3))))[..., None, None]
    assert first.out_channels == 2 and torch.allclose(attention(x), x * weight + x, atol=1e-6)


def test_schedule_of_mutual_supervision():
    assert mutual_weight(0) == pytest.approx(0.1 * math.exp(-5))
    assert mutual_weight(0.5) == pytest.approx(0.1 * math.exp(-1.25)) and mutual_weight(1) == 0.1


def test_losses_are_those_of_loops():
    labels = (torch.rand(2, 8, 12) < 0.4).long()
    first, second = ([torch.randn(2, 8, 8 >> s, 12 >> s) for s in range(2)] for _ in range(2))
    bce = F.binary_cross_entropy
    expected = sum(bce(x.sigmoid(), connectivity(labels[:, :: 2**s, :: 2**s].float())) for s, x in enumerate(first))
    assert torch.allclose(connectivity_loss(first, labels), expected, atol=1e-6)
    expected = 0
    for a, b in zip(first, second, strict=True):
        for own, other in ((a, b), (b, a)):
            expected = expected + bce(own.sigmoid(), (other.sigmoid() >= 0.5001).float())
    assert torch.allclose(mutual_loss(first, second, labels), expected, atol=1e-6)


def test_ignored_pixels_do_not_count():
    labels = torch.ones(1, 4, 4, dtype=torch.long)
    labels[:, 2:] = 255
    logits = [torch.randn(1, 8, 4, 4, requires_grad=True)]
    (connectivity_loss(logits, labels) + mutual_loss(logits, [-logits[0].detach()], labels)).backward()
    assert logits[0].grad[:, :, :2].abs().min() > 0 and not logits[0].grad[:, :, 2:].any()
    assert connectivity_loss(logits, torch.full((1, 4, 4), 255)) == 0


def test_the_other_view_s_decisions_are_not_trained():
    first, second = ([torch.randn(1, 8, 4, 4, requires_grad=True)] for _ in range(2))
    labels = torch.zeros(1, 4, 4)
    [of_second] = torch.autograd.grad(mutual_loss(first, second, labels), second)
    target = (first[0] > math.log(0.5001 / 0.4999)).float()
    assert torch.allclose(of_second, (second[0].sigmoid() - target) / second[0].numel(), atol=1e-6)


def test_gamma_brings_the_mean_to_the_middle():
    rng = np.random.default_rng(0)
    for low, high in ((5, 60), (190, 250)):
        image = rng.integers(low, high, (40, 50, 3), dtype=np.uint8)
        copy = gamma_copy(image)
        mean = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).mean()
        g = math.log10(0.5) / math.log10(mean / 255)
        assert np.array_equal(copy, np.round((image / 255) ** g * 255).astype(np.uint8))
        assert abs(cv2.cvtColor(copy, cv2.COLOR_BGR2GRAY).mean() - 127.5) < 12


@pytest.mark.parametrize("value", [0, 255])
def test_an_image_without_gamma_is_its_own_copy(value):
    image = np.full((4, 5, 3), value, np.uint8)
    assert np.array_equal(gamma_copy(image), image)
