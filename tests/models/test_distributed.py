"""What DistributedDataParallel asks of the models: a gradient for every parameter, in the parameter's own strides."""

import json
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn

from ssm_models import VSSD, VSSM, DenseBackbone
from ssm_models.layers.conv2d import Conv2d
from ssm_models.layers.simple_fpn import SimpleFeaturePyramid

MIXERS = ["v0", "v05_oncnorm", "v05_ondwconv3", "m0", "xv1a_ocov_ocov2", "xv2a_cpos"]
MODELS = {
    name: lambda name=name, **more: timm.create_model(name, **more)
    for name in ("vmamba_nano", "vssd_nano", "vssd_nano_iccv2025", "vim_nano")
} | {
    f"{norm} {mixer}": lambda norm=norm, mixer=mixer, **more: VSSM(
        depths=(1, 1), dims=16, num_classes=3, norm_layer=norm, forward_type=mixer, **more
    )
    for mixer in MIXERS
    for norm in ("ln", "ln2d")
}
MODELS["vssd simple"] = lambda **more: VSSD(
    embed_dim=16, depths=(1, 1), num_heads=(1, 2), attn_types=("mamba2", "standard"), d_state=8,
    simple_patch_embed=True, simple_downsample=True, num_classes=3, **more,
)  # fmt: skip


def other_strides(model: nn.Module) -> list[str]:
    return [
        f"{name} {tuple(p.shape)}: {p.grad.stride()} instead of {p.stride()}"
        for name, p in model.named_parameters()
        if p.grad.stride() != p.stride()
    ]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_come_in_the_strides_of_their_parameters(name, layout, autocast):
    in_chans = 1 if autocast else 3  # gray images: one more weight with a dimension of one element
    model = MODELS[name](in_chans=in_chans).to(memory_format=layout)
    images = torch.randn(2, in_chans, 16, 16).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(images)
    y.float().square().sum().backward()
    assert other_strides(model) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("out, per_group, groups", [(8, 1, 8), (8, 8, 1), (8, 1, 1), (1, 8, 1), (16, 1, 8)])
def test_convolutions_with_dimensions_of_one_element(out, per_group, groups, inputs, layout):
    for kernel in (1, 3, 4):
        conv = Conv2d(per_group * groups, out, kernel, padding=kernel // 2, groups=groups).to(memory_format=layout)
        x = torch.randn(2, per_group * groups, 7, 6).contiguous(memory_format=inputs).requires_grad_()
        dy = torch.randn_like(conv(x))
        conv(x).backward(dy)
        got = [x.grad, *(p.grad for p in conv.parameters())]
        assert other_strides(conv) == []
        wanted = torch.autograd.grad(nn.Conv2d.forward(conv, x), [x, *conv.parameters()], dy)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            assert torch.equal(conv(x), nn.Conv2d.forward(conv, x))


def test_convolution_of_the_pyramid():
    pyramid = SimpleFeaturePyramid(16, 8).to(memory_format=torch.channels_last)
    sum(level.square().sum() for level in pyramid((torch.randn(1, 16, 4, 4),))).backward()
    assert other_strides(pyramid) == []


CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
FEWER_MAPS = [
    ("vmamba_nano", (0, 1), CONTIGUOUS),
    ("vmamba_nano", (0,), CHANNELS_LAST),
    ("vssd_nano", (1,), CONTIGUOUS),
    ("vssd_nano", (0, 1), CHANNELS_LAST),
    ("vim_nano", (2,), CONTIGUOUS),
]


def train_two_steps(rank: int, port: int) -> list[list[float]]:
    """One of two processes: two updates of every backbone. Returns the sums of the parameters, and all warnings."""
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    torch.manual_seed(rank)
    results = []
    try:
        for name, indices, layout in FEWER_MAPS:
            backbone = DenseBackbone(name, indices, drop_path_rate=0.0).to(memory_format=layout)
            model = nn.parallel.DistributedDataParallel(backbone)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(2):
                maps = model(torch.randn(2, 3, 32, 32).contiguous(memory_format=layout))
                optimizer.zero_grad()
                sum(x.square().mean() for x in maps).backward()
                optimizer.step()
            results.append([float(p.detach().double().sum()) for p in backbone.parameters()])
        dist.barrier()  # the first process holds the address: it leaves last
    finally:
        dist.destroy_process_group()
    return results


def second_process(port: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sums = train_two_steps(1, port)
    print(json.dumps({"sums": sums, "warnings": [str(w.message) for w in caught if "stride" in str(w.message)]}))


def test_two_processes_train_backbones_with_fewer_maps_than_stages():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    second = subprocess.Popen(
        [sys.executable, "-c", f"from tests.models.test_distributed import *; second_process({port})"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    sums = train_two_steps(0, port)
    told = json.loads(second.communicate(timeout=300)[0])
    assert told == {"sums": sums, "warnings": []}
    assert len(sums) == 5 and min(map(len, sums)) > 10
