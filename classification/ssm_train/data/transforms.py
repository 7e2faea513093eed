"""Image transforms and batch mixing, by timm, from the AUG section."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, auto_augment, create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from yacs.config import CfgNode as CN

from ssm_train.common.errors import UserError
from ssm_train.config.defaults import channels

# up to this size (CIFAR, digits) images are shifted by a padded crop instead of being cut out of a larger image
_SMALL = 32
_PADDING = 4

Transform = Callable[[Image.Image], torch.Tensor]  # of an RGB image, or a grey one

# by channels: of ImageNet, and for grey images the means of its three
STATISTICS = {
    3: (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    1: ((sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)),
}


def train_transform(cfg: CN, raw: bool = False) -> Transform:
    """Image -> normalised fp32 tensor (C, S, S), augmented by the global python, numpy and torch generators; with `raw`
    a uint8 tensor, neither normalised nor erased: `OnDevice` does both.

    AUG.CROP simple and AUG.THREE_AUGMENT are those of DeiT III (Touvron et al. 2022, https://arxiv.org/abs/2204.07118,
    section 3): a random square of the shorter side, and greyscale, solarisation or blur (one of them, always) followed
    by colour jitter. In the way of that paper AUG.REPROB is 0.
    """
    size, aug, mode = cfg.DATA.IMG_SIZE, cfg.AUG, InterpolationMode(cfg.DATA.INTERPOLATION)
    mean, std = STATISTICS[channels(cfg)]
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment="3a" if aug.THREE_AUGMENT else aug.AUTO_AUGMENT or None,
            interpolation=cfg.DATA.INTERPOLATION,
            mean=mean,
            std=std,
            re_prob=0.0 if raw else aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            use_prefetcher=raw,  # ends in uint8
        )
    except (AssertionError, ValueError) as error:
        # timm asserts the grammar of the policy string
        raise UserError(
            f"AUG.AUTO_AUGMENT {aug.AUTO_AUGMENT!r} is not a policy of timm ({error}); e.g. rand-m9-mstd0.5-inc1"
        ) from error
    for op in _operations(transform.transforms):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize
    if size <= _SMALL:
        resize = transforms.Resize((size, size), mode)
        transform.transforms[0:1] = [resize, transforms.RandomCrop(size, padding=_PADDING)]
    elif aug.CROP == "simple":
        crop = transforms.RandomCrop(size, padding=_PADDING, padding_mode="reflect")
        transform.transforms[0:1] = [transforms.Resize(size, mode), crop]
    return transform


def _operations(parts: Iterable[Any]) -> Iterator[auto_augment.AugmentOp]:
    """The operations of timm's policies among `parts`."""
    for part in parts:
        if isinstance(part, auto_augment.AugmentOp):
            yield part
        elif isinstance(part, (auto_augment.RandAugment, auto_augment.AugMixAugment)):
            yield from _operations(part.ops)
        elif isinstance(part, auto_augment.AutoAugment):
            yield from (op for policy in part.policy for op in policy)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation: keep the `bits` highest bits, 0 to 8. At the highest magnitude timm keeps none, which gives a
    black image, and an error from Pillow 13 on."""
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def eval_transform(cfg: CN) -> Transform:
    """Image -> normalised fp32 tensor (C, S, S): shorter side to S / CROP_RATIO and centre crop. With CROP_RATIO 1, and
    for small S, the whole image is resized to the square."""
    size, mode, ratio = cfg.DATA.IMG_SIZE, InterpolationMode(cfg.DATA.INTERPOLATION), cfg.DATA.CROP_RATIO
    if size <= _SMALL or ratio == 1:
        resize = [transforms.Resize((size, size), mode)]
    else:
        resize = [transforms.Resize(int(size / ratio), mode), transforms.CenterCrop(size)]
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(*STATISTICS[channels(cfg)])])


def build_mixup(cfg: CN) -> Mixup | None:
    """Mixup and/or CutMix of a batch (with label smoothing inside), None where both are off."""
    aug = cfg.AUG
    if aug.MIXUP == 0 and aug.CUTMIX == 0 and aug.CUTMIX_MINMAX is None:
        return None
    if cfg.DATA.BATCH_SIZE % 2:
        raise UserError(
            f"mixup and cutmix pair the images of a batch, but DATA.BATCH_SIZE is {cfg.DATA.BATCH_SIZE}: "
            "make it even or switch them off (--opts AUG.MIXUP 0 AUG.CUTMIX 0)"
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        num_classes=cfg.MODEL.NUM_CLASSES,
    )
