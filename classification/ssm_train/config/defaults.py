"""Every key of the configuration with its default, and which values make no sense."""

import math
from typing import Any

from yacs.config import CfgNode as CN

from ssm_train.common.errors import UserError


def default_config() -> CN:
    """The published ImageNet-1K recipe of VMamba; a YAML names a model and what differs.

    None of OPEN is given: a run settles it by its data or machine, see ssm_train/settle.py.
    """
    cfg = CN()
    cfg.DATA = CN()
    cfg.DATA.DATA_PATH = ""
    cfg.DATA.DATASET = "folder"  # how DATA_PATH is laid out, see data/sources
    cfg.DATA.VAL_SHARE = 0.2  # of each class of photos that come without a split, set apart by SEED
    cfg.DATA.CACHE_MODE = "no"  # read bytes when needed (no), or hold a share per rank (part) or all (full) in memory
    cfg.DATA.BATCH_SIZE = None  # images per process and micro-step; None divides 128 into micro-steps that fit
    cfg.DATA.RANGE = []  # [low, high], black and white in images of more than 8 bits a channel; [] refuses these
    cfg.DATA.IMG_SIZE = 224
    cfg.DATA.INTERPOLATION = "bicubic"
    cfg.DATA.CROP_RATIO = 0.875  # of the shorter side, kept by validation's centre crop; 1 resizes to the square
    cfg.DATA.REPEATS = 1  # copies of an image in a batch, augmented differently; an epoch has 1/REPEATS of the images
    cfg.DATA.NUM_WORKERS = None  # loader processes per training process, 0 for none; None: as many as there are cores
    cfg.DATA.MAX_BAD_SHARE = 0.01  # share of unreadable training images above which a run stops

    cfg.MODEL = CN()
    cfg.MODEL.NAME = "vmamba_tiny_s1l8"  # any name of timm's registry
    cfg.MODEL.NUM_CLASSES = None  # None: as many as the training data have
    cfg.MODEL.DROP_PATH_RATE = 0.1
    cfg.MODEL.LABEL_SMOOTHING = 0.1
    cfg.MODEL.PRETRAINED = ""  # weights to begin with: a published name or a path; "" begins with random ones
    cfg.MODEL.NEW_HEAD = False  # of these all but the classifier, for other classes
    cfg.MODEL.KWARGS = CN(new_allowed=True)  # of these, in_chans 1 trains on grey images

    cfg.TRAIN = CN()
    cfg.TRAIN.EPOCHS = 300  # None: as many as TRAIN.UPDATES take, see ssm_train/settle.py
    cfg.TRAIN.WARMUP_EPOCHS = 20  # None: a tenth of the epochs
    cfg.TRAIN.UPDATES = 300  # optimizer updates to aim at where EPOCHS is None
    cfg.TRAIN.BASE_LR = 5e-4  # the three rates are for a global batch of 512, see lr_scheduler.py
    cfg.TRAIN.WARMUP_LR = 5e-7
    cfg.TRAIN.MIN_LR = 5e-6
    cfg.TRAIN.LR_SCALING = "all"  # rates that follow the global batch: all, base alone (the trainer of Vim), or none
    cfg.TRAIN.SCHEDULER = CN()
    cfg.TRAIN.SCHEDULER.NAME = "cosine"  # cosine, linear, step or multistep
    cfg.TRAIN.SCHEDULER.PER = "update"  # the rate changes with every update or every epoch
    cfg.TRAIN.SCHEDULER.WARMUP_PREFIX = True  # cosine, linear: they begin after the warm-up instead of at 0
    cfg.TRAIN.SCHEDULER.DECAY_EPOCHS = 30  # step
    cfg.TRAIN.SCHEDULER.DECAY_RATE = 0.1  # step, multistep
    cfg.TRAIN.SCHEDULER.MULTISTEPS = []  # epochs
    cfg.TRAIN.OPTIMIZER = "adamw"  # or sgd (Nesterov)
    cfg.TRAIN.BETAS = [0.9, 0.999]
    cfg.TRAIN.EPS = 1e-8
    cfg.TRAIN.MOMENTUM = 0.9  # sgd
    cfg.TRAIN.WEIGHT_DECAY = 0.05
    cfg.TRAIN.DECAY_SSM = False  # decay A_logs and dt biases as upstream's trainers do, against the authors' marks
    cfg.TRAIN.LAYER_DECAY = 1.0  # factor of the rate per layer, from the head down
    cfg.TRAIN.FREEZE_STAGES = 0  # 1 freezes the stem, n + 1 also the first n stages
    cfg.TRAIN.LINEAR_PROBE = False  # train the classifier alone
    cfg.TRAIN.CLIP_GRAD = 5.0  # largest global gradient norm; 0 measures the norm without clipping
    cfg.TRAIN.ACCUMULATION_STEPS = 1
    cfg.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass
    cfg.TRAIN.EMA_DECAY = 0.9999  # per optimizer update; 0 keeps no average
    cfg.TRAIN.LOSS = "ce"  # cross-entropy, or bce: binary cross-entropy with every class of the mixed target on
    cfg.TRAIN.COSUB = False  # two passes with different dropped paths teach each other (DeiT III)
    cfg.TRAIN.MESA = 0.0  # weight of the cross-entropy to the averaged weights' prediction; 0 for none
    cfg.TRAIN.MESA_START = 0.25  # share of the epochs before MESA sets in
    cfg.TRAIN.KEEP_CHECKPOINTS = 3  # newest ones, besides last, best and best_ema
    cfg.TRAIN.SAVE_UPDATES = 500  # updates between two checkpoints inside an epoch; 0 saves at its end alone
    cfg.TRAIN.MAX_NONFINITE = 5  # updates in a row that may be skipped before rolling back to the last checkpoint
    cfg.TRAIN.MAX_ROLLBACKS = 3

    cfg.DISTILL = CN()
    cfg.DISTILL.TEACHER = ""  # any name of timm's registry; "" for none
    cfg.DISTILL.WEIGHTS = ""  # file for the teacher
    cfg.DISTILL.TYPE = "soft"  # soft (its probabilities) or hard (its decision)
    cfg.DISTILL.ALPHA = 0.5  # share of the teacher's loss
    cfg.DISTILL.TAU = 1.0  # temperature of soft

    cfg.AUG = CN()
    cfg.AUG.HFLIP = 0.5
    cfg.AUG.CROP = "random_resized"  # or simple: shorter side to the size, then a random square (DeiT III)
    cfg.AUG.THREE_AUGMENT = False  # grey, solarise or blur, in place of AUTO_AUGMENT (DeiT III)
    cfg.AUG.COLOR_JITTER = 0.4  # used only without AUTO_AUGMENT, as timm does
    cfg.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # "" for none
    cfg.AUG.REPROB = 0.25
    cfg.AUG.REMODE = "pixel"
    cfg.AUG.RECOUNT = 1
    cfg.AUG.MIXUP = 0.8
    cfg.AUG.CUTMIX = 1.0
    cfg.AUG.CUTMIX_MINMAX = None
    cfg.AUG.MIXUP_PROB = 1.0
    cfg.AUG.MIXUP_SWITCH_PROB = 0.5
    cfg.AUG.MIXUP_MODE = "batch"

    cfg.AMP = "auto"  # bf16, fp16 (with gradient scaling), off, or auto: bf16 or else fp16 on a GPU, off on the CPU
    cfg.COMPILE = False  # torch.compile
    cfg.CHANNELS_LAST = False
    cfg.PARALLEL = "ddp"  # several processes: every one has the model (ddp), or a share of it (fsdp)
    cfg.MEMORY_SHARE = 0.0  # most GPU memory a process may take, as a share; 0 for no limit
    cfg.TIMEOUT = 600  # seconds that processes wait for each other
    cfg.DEVICE = ""  # cpu, cuda, mps, or "" for CUDA where there is one, else the CPU
    cfg.OUTPUT = "output"
    cfg.TAG = ""
    cfg.SEED = 0
    cfg.PRINT_FREQ = 10  # micro-steps between two measurements in the logs; a line comes every 5 s, too
    cfg.WANDB = ""  # project of Weights & Biases; "" to leave it alone
    return cfg


# integers that may be None
OPEN = ("DATA.BATCH_SIZE", "DATA.NUM_WORKERS", "MODEL.NUM_CLASSES", "TRAIN.EPOCHS", "TRAIN.WARMUP_EPOCHS")


def channels(cfg: CN) -> int:
    """Of the images and the network: 3 for RGB, 1 for grey."""
    return cfg.MODEL.KWARGS.get("in_chans", 3)


def lookup(cfg: CN, key: str) -> Any:
    """The node or value at a dotted key, None where there is none."""
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CN) else None
    return node


def flattened(cfg: CN, prefix: str = "") -> dict[str, Any]:
    """Values by dotted keys."""
    values = {}
    for name, value in cfg.items():
        if isinstance(value, CN):
            values |= flattened(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return values


def replaced(cfg: CN, values: dict[str, Any]) -> CN:
    """A frozen copy of the config with other values at dotted keys."""
    copy = cfg.clone()
    copy.defrost()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        node = lookup(copy, section) if section else copy
        node[name] = value
    copy.freeze()
    return copy


_AT_LEAST_1 = (
    "TIMEOUT",
    "DATA.BATCH_SIZE",
    "DATA.IMG_SIZE",
    "DATA.REPEATS",
    "MODEL.NUM_CLASSES",
    "TRAIN.EPOCHS",
    "TRAIN.UPDATES",
    "TRAIN.ACCUMULATION_STEPS",
    "TRAIN.KEEP_CHECKPOINTS",
    "TRAIN.SCHEDULER.DECAY_EPOCHS",
    "TRAIN.MAX_NONFINITE",
    "AUG.RECOUNT",
    "PRINT_FREQ",
)
_AT_LEAST_0 = (
    "DATA.NUM_WORKERS",
    "TRAIN.WARMUP_EPOCHS",
    "TRAIN.BASE_LR",
    "TRAIN.WARMUP_LR",
    "TRAIN.MIN_LR",
    "TRAIN.WEIGHT_DECAY",
    "TRAIN.EPS",
    "TRAIN.CLIP_GRAD",
    "TRAIN.FREEZE_STAGES",
    "TRAIN.MESA",
    "TRAIN.SAVE_UPDATES",
    "TRAIN.MAX_ROLLBACKS",
    "AUG.COLOR_JITTER",
    "AUG.MIXUP",
    "AUG.CUTMIX",
    "SEED",
)
_BELOW_1 = ("MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING", "TRAIN.EMA_DECAY", "TRAIN.MOMENTUM")
_SHARES = (
    "DATA.CROP_RATIO",
    "DATA.MAX_BAD_SHARE",
    "TRAIN.MESA_START",
    "TRAIN.LAYER_DECAY",
    "TRAIN.SCHEDULER.DECAY_RATE",
    "DISTILL.ALPHA",
    "AUG.HFLIP",
    "AUG.REPROB",
    "AUG.MIXUP_PROB",
    "AUG.MIXUP_SWITCH_PROB",
    "MEMORY_SHARE",
)
_CHOICES = {
    "AMP": ("auto", "bf16", "fp16", "off"),
    "DEVICE": ("", "cpu", "cuda", "mps"),
    "PARALLEL": ("ddp", "fsdp"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "DATA.INTERPOLATION": ("bilinear", "bicubic"),
    "TRAIN.LR_SCALING": ("all", "base", "none"),
    "TRAIN.SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "TRAIN.SCHEDULER.PER": ("update", "epoch"),
    "TRAIN.OPTIMIZER": ("adamw", "sgd"),
    "TRAIN.LOSS": ("ce", "bce"),
    "DISTILL.TYPE": ("soft", "hard"),
    "AUG.CROP": ("random_resized", "simple"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
}


def check_config(cfg: CN) -> None:
    """Refuse values that would fail later or silently mean something else. Raises UserError."""

    def need(key: str, condition: bool, wanted: str) -> None:
        if not condition:
            raise UserError(f"config {key} is {lookup(cfg, key)!r}, but it must be {wanted}")

    for keys, least, wanted in ((_AT_LEAST_1, 1, "at least 1"), (_AT_LEAST_0, 0, "0 or larger")):
        for key in keys:
            value = lookup(cfg, key)
            need(key, (value is None and key in OPEN) or value >= least, wanted)
    for key in _BELOW_1:
        need(key, 0 <= lookup(cfg, key) < 1, "at least 0 and below 1")
    for key in _SHARES:
        need(key, 0 <= lookup(cfg, key) <= 1, "between 0 and 1")
    for key, choices in _CHOICES.items():
        need(key, lookup(cfg, key) in choices, "one of " + ", ".join(map(repr, choices)))
    train = cfg.TRAIN
    fits = None in (train.EPOCHS, train.WARMUP_EPOCHS) or train.WARMUP_EPOCHS < train.EPOCHS
    need("TRAIN.WARMUP_EPOCHS", fits, f"below TRAIN.EPOCHS, {train.EPOCHS}, or None for a tenth of these")
    open_epochs = train.EPOCHS is None and train.WARMUP_EPOCHS is not None
    need("TRAIN.WARMUP_EPOCHS", not open_epochs, "None where TRAIN.EPOCHS is")
    need("DATA.VAL_SHARE", 0 < cfg.DATA.VAL_SHARE < 1, "above 0 and below 1")
    need("TRAIN.BETAS", len(train.BETAS) == 2 and all(0 <= beta < 1 for beta in train.BETAS), "two numbers in [0, 1)")
    steps = train.SCHEDULER.MULTISTEPS
    need("TRAIN.SCHEDULER.MULTISTEPS", sorted(set(steps)) == steps, "epochs in rising order")
    minmax = cfg.AUG.CUTMIX_MINMAX
    in_order = minmax is None or (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1)
    need("AUG.CUTMIX_MINMAX", in_order, "None or [low, high] with 0 <= low < high <= 1")
    need("DATA.RANGE", not cfg.DATA.RANGE or _is_range(cfg.DATA.RANGE), "[] or two numbers [low, high] with low < high")
    in_chans = channels(cfg)
    need("MODEL.KWARGS.in_chans", type(in_chans) is int and in_chans in (1, 3), "1 (grey images) or 3 (RGB)")
    teacher = in_chans != 3 and cfg.DISTILL.TEACHER
    need("DISTILL.TEACHER", not teacher, f"'' with MODEL.KWARGS.in_chans {in_chans}: teachers see RGB")
    need("DATA.CROP_RATIO", cfg.DATA.CROP_RATIO > 0, "above 0")
    need("DISTILL.TAU", cfg.DISTILL.TAU > 0, "above 0")
    need("TRAIN.MESA", not train.MESA or train.EMA_DECAY > 0, "0 without TRAIN.EMA_DECAY: its teacher is the average")
    smooth = train.LOSS == "bce" and cfg.MODEL.LABEL_SMOOTHING > 0
    need("MODEL.LABEL_SMOOTHING", not smooth, "0 with TRAIN.LOSS bce: smoothing would turn every class on")
    shares = cfg.PARALLEL == "fsdp" and cfg.CHANNELS_LAST
    need("PARALLEL", not shares, "'ddp' with CHANNELS_LAST: FSDP cannot split such weights")
    need("TRAIN.COSUB", not train.COSUB or train.LOSS == "bce", "False unless TRAIN.LOSS is bce")


def _is_range(values: list[Any]) -> bool:
    numbers = len(values) == 2 and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    return numbers and values[0] < values[1]
