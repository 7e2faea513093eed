"""The last steps of augmentation on a GPU: images cross the bus in 8 bits, and are normalised and erased there."""

import torch
from timm.data.random_erasing import RandomErasing
from yacs.config import CfgNode as CN

from ssm_train.config.defaults import channels
from ssm_train.data.transforms import STATISTICS


class OnDevice:
    """What `train_transform` leaves out with `raw`: images (B, C, S, S) of uint8 -> the same in fp32, normalised, and
    in parts erased (Zhong et al. 2017, "Random Erasing", https://arxiv.org/abs/1708.04896) with AUG.REPROB.

    Chance is that of the global python and torch generators, which every step seeds: a run that goes on draws what it
    would have drawn.
    """

    def __init__(self, cfg: CN, device: torch.device) -> None:
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in STATISTICS[channels(cfg)])
        self._scale, self._shift = 1 / (255 * std), -mean / std
        aug = cfg.AUG
        self._erase = RandomErasing(aug.REPROB, mode=aug.REMODE, max_count=aug.RECOUNT, device=device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._erase(torch.addcmul(self._shift, images.float(), self._scale))
