"""Averaged weights: average = decay * average + (1 - decay) * weights, after every update."""

import copy

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Average:
    """A copy of `network`, in evaluation mode, whose parameters and buffers follow those of the network.

    What timm's ModelEmaV3 computes, but the tensors are looked up once: two state dicts per update cost as much as the
    rest of the loop for a small network.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).eval().requires_grad_(False)
        self._network, self._decay = network, decay
        # own and followed tensors that one call can average, and those that are only copied
        self._averaged: list[tuple[list[torch.Tensor], list[torch.Tensor]]] | None = None
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the network."""
        if self._averaged is None:
            self._averaged = self._pair()
        for own, followed in self._averaged:
            torch._foreach_lerp_(own, followed, weight=1 - self._decay)
        for own, followed in self._copied:
            own.copy_(followed)
        self._forget_gathered()

    @torch.no_grad()
    def reset(self) -> None:
        """Become the network."""
        for own, followed in zip(self.module.state_dict().values(), self._network.state_dict().values(), strict=True):
            own.copy_(followed)
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        """The root of a sharded module keeps its gathered parameters after a forward until a backward, which never
        comes: the next forward would not see the change."""
        if isinstance(self.module, FSDPModule):
            self.module.reshard()

    def _pair(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Look the tensors up, at the first update: sharding has replaced them by then. They change in place."""
        groups: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for own, followed in zip(self.module.state_dict().values(), self._network.state_dict().values(), strict=True):
            if own.is_floating_point():
                # one call takes distributed tensors or plain ones, not both
                owns, follows = groups.setdefault(isinstance(own, DTensor), ([], []))
                owns.append(own)
                follows.append(followed)
            else:
                self._copied.append((own, followed))
        return list(groups.values())
