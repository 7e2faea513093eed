"""One model on several processes: every process has all of it (DDP) or a share of it (FSDP2).

Weights and optimizer states leave and enter as whole tensors, so checkpoints do not know how they were distributed.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode as CN

from ssm_train.common.distributed import World


def shard(network: nn.Module, world: World) -> None:
    """Split the parameters over the processes, in place (FSDP2). Each repeated block is a unit, which is gathered when
    its forward or backward begins and dropped afterwards; what is left is another."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    # inner units come before those that contain them
    for container in reversed(list(network.modules())):
        blocks = list(container.children()) if isinstance(container, nn.ModuleList | nn.Sequential) else []
        if len({type(block) for block in blocks}) == 1:
            for block in blocks:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def wrap(network: nn.Module, cfg: CN, world: World) -> nn.Module:
    """The module that training calls: `network`, averaged over the ranks by DDP where FSDP does not, and compiled."""
    if world.size > 1 and cfg.PARALLEL == "ddp":
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        network = DistributedDataParallel(
            network,
            device_ids=device_ids,
            # all parameters are used in every step, those that are frozen in none
            static_graph=cfg.TRAIN.ACCUMULATION_STEPS == 1,
            # running statistics are exchanged once per update, by take_update
            broadcast_buffers=False,
        )
    if cfg.COMPILE and cfg.TRAIN.USE_CHECKPOINT:
        # the splitting of graphs at DDP's buckets does not know recomputation before torch 2.7
        torch._dynamo.config.optimize_ddp = False
    return torch.compile(network) if cfg.COMPILE else network


@contextlib.contextmanager
def exchange(parallel: nn.Module, closing: bool) -> Iterator[None]:
    """The context of a micro-step: gradients are exchanged once per update, in its last (`closing`) micro-step."""
    inner = getattr(parallel, "_orig_mod", parallel)
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(closing)
        yield
    elif isinstance(inner, DistributedDataParallel) and not closing:
        with inner.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every process has all parameters, so that forwards need no exchange and their number may differ."""
    units = [module for network in networks for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False)
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True)


def like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`, distributed as `own` is, or in its memory layout: optimizers pair numbers by their place."""
    if isinstance(own, DTensor):
        return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
    return torch.empty_like(own, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@torch.no_grad()
def load_whole(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into the parameters and buffers of `network`, which has the same names and shapes."""
    for name, own in network.state_dict().items():
        own.copy_(like(tensors[name], own))
