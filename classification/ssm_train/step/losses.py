"""What training minimises: cross-entropies, and three teachers (another network, the averaged weights, one's twin).

Legend: B images of a micro-step, C channels, S image size, K classes.
"""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from yacs.config import CfgNode as CN

from ssm_train.common.errors import UserError
from ssm_train.common.precision import autocast, resolve_amp
from ssm_train.step.model import check_model_name
from ssm_train.step.pretrained import Pretrained, load_pretrained

Teacher = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, S, S), normalised as ours -> fp32 logits (B, K)


def soft_cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """-sum_k p_k log softmax(z)_k, mean over images. logits z and probabilities p (B, K) -> scalar."""
    return F.cross_entropy(logits, probabilities)


def cosub(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Two passes a, b with other dropped paths, each taught by the targets t and by the other one's prediction:

        (bce(a, t) + bce(b, t) + bce(a, sigmoid(b)) + bce(b, sigmoid(a))) / 4

    with no gradient through the sigmoids; bce is the mean over images and classes. All (B, K) -> scalar.
    Source: Touvron et al. 2022, "Co-training 2^L submodels for visual recognition" (https://arxiv.org/abs/2212.04884),
    with lambda = 1/2, as option --cosub of DeiT III's trainer computes it.
    """
    bce = F.binary_cross_entropy_with_logits
    by_targets = bce(first, targets) + bce(second, targets)
    by_twin = bce(first, second.detach().sigmoid()) + bce(second, first.detach().sigmoid())
    return 0.25 * (by_targets + by_twin)


def soft_distillation(logits: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """tau^2 / (B K) * sum over images and classes of q (log q - log p), p = softmax(z / tau) and q the teacher's.

    logits z and teacher logits (B, K) -> scalar. Source: Hinton et al. 2015 (https://arxiv.org/abs/1503.02531),
    section 2; DeiT's trainer (https://arxiv.org/abs/2012.12877, eq. 2) divides by B K where the paper divides by B.
    """
    student, teacher = (logits / tau).log_softmax(-1), (teacher / tau).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / logits.numel()


def hard_distillation(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the teacher's decision (DeiT, eq. 3, without the label smoothing). Both (B, K) -> scalar."""
    return F.cross_entropy(logits, teacher.argmax(-1))


def mesa_starts(cfg: CN) -> int:
    """The first epoch, counted from 0, in which the averaged weights teach."""
    return int(cfg.TRAIN.MESA_START * cfg.TRAIN.EPOCHS)


class Criterion:
    """The loss of a micro-step, in fp32:

        base                                                the targets: cross-entropy, binary cross-entropy, or cosub
        (1 - ALPHA) base + ALPHA distillation               with a teacher network (DeiT, eq. 2 and 3)
        ... + MESA soft_cross_entropy(z, softmax(average))  with the averaged weights' prediction of the same images

    Source of the last: Du et al. 2022, "Sharpness-Aware Training for Free" (https://arxiv.org/abs/2205.14083), in the
    form with which VSSD was trained (https://arxiv.org/abs/2407.18559): no temperature, constant weight.

    `copies`: how often the network must see every image in one batch, 2 for cosub: cat([images, images]).
    """

    def __init__(self, cfg: CN, teacher: Teacher | None) -> None:
        self.copies = 2 if cfg.TRAIN.COSUB else 1
        self._binary = cfg.TRAIN.LOSS == "bce"
        self._smoothing = cfg.MODEL.LABEL_SMOOTHING
        self._mesa = cfg.TRAIN.MESA
        self._teacher = teacher
        self._hard, self._alpha, self._tau = cfg.DISTILL.TYPE == "hard", cfg.DISTILL.ALPHA, cfg.DISTILL.TAU

    def __call__(
        self,
        images: torch.Tensor,
        logits: torch.Tensor,
        targets: torch.Tensor,
        average_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """images (B, C, S, S), logits (copies * B, K) in fp32, targets (B,) classes or (B, K) probabilities, already
        smoothed, average_logits (B, K) in fp32 where MESA is active -> scalar."""
        loss = self._base(logits, targets)
        if self._teacher is not None:
            taught = self._teacher(images).repeat(self.copies, 1)
            distilled = (
                hard_distillation(logits, taught) if self._hard else soft_distillation(logits, taught, self._tau)
            )
            loss = (1 - self._alpha) * loss + self._alpha * distilled
        if average_logits is not None:
            loss = loss + self._mesa * soft_cross_entropy(logits, average_logits.softmax(-1).repeat(self.copies, 1))
        return loss

    def _base(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not self._binary:
            smoothing = 0.0 if targets.is_floating_point() else self._smoothing
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if not targets.is_floating_point():
            targets = F.one_hot(targets, logits.shape[1])
        # every class of a mixed image is wholly there: --bce-loss of DeiT III (https://arxiv.org/abs/2204.07118)
        targets = (targets > 0).to(logits.dtype)
        if self.copies == 2:
            return cosub(*logits.chunk(2), targets)
        return F.binary_cross_entropy_with_logits(logits, targets)


def build_criterion(cfg: CN, device: torch.device) -> Criterion:
    """The criterion of the config, with its teacher on `device`. UserError for what cannot teach."""
    return Criterion(cfg, load_teacher(cfg, device) if cfg.DISTILL.TEACHER else None)


def load_teacher(cfg: CN, device: torch.device) -> Teacher:
    """The network DISTILL.TEACHER with all its weights from DISTILL.WEIGHTS: in evaluation mode, without gradients, in
    the precision of training. Our images are normalised for it where it was trained with other statistics.

    Raises UserError for an unknown name, no weights, weights that differ in any name or shape (of another number of
    classes, too), and a network that does not take images of DATA.IMG_SIZE.
    """
    name, weights = cfg.DISTILL.TEACHER, cfg.DISTILL.WEIGHTS
    check_model_name(name, "DISTILL.TEACHER")
    if not weights:
        raise UserError(f"DISTILL.TEACHER {name} has no weights: give its .safetensors or .pth file as DISTILL.WEIGHTS")
    network = timm.create_model(name, num_classes=cfg.MODEL.NUM_CLASSES).requires_grad_(False).eval()
    loaded = load_pretrained(network, Pretrained(Path(weights)), option="DISTILL.WEIGHTS")
    # what this trainer wrote has its statistics, whatever others trained the same network on
    scale, shift = (torch.tensor(1.0), torch.tensor(0.0)) if loaded.ours else _renormalisation(network)
    scale, shift = scale.to(device), shift.to(device)
    network.to(device)
    amp = resolve_amp(cfg.AMP, device)

    @torch.no_grad()
    def predict(images: torch.Tensor) -> torch.Tensor:
        with autocast(amp, device):
            return network(images * scale + shift).float()

    size = cfg.DATA.IMG_SIZE
    try:
        predict(torch.zeros(1, 3, size, size, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"DISTILL.TEACHER {name} does not take images of DATA.IMG_SIZE {size}: {error}") from error
    return predict


def _renormalisation(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each: scale and shift from images normalised as ours to those that a network of timm was trained on."""
    own = network.pretrained_cfg
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    its_mean, its_std = torch.tensor(own["mean"]), torch.tensor(own["std"])
    return (std / its_std)[:, None, None], ((mean - its_mean) / its_std)[:, None, None]
