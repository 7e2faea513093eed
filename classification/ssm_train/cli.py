"""The command line of training and evaluation.

    python classification/main.py --cfg FILE --data-path FOLDER --output FOLDER [--tag NAME] [--batch-size N] ...
    torchrun --nproc_per_node=2 classification/main.py ...           (or python -m torch.distributed.launch)

The run folder is OUTPUT/TAG, or OUTPUT without --tag. It receives config.yaml, log.txt, log.jsonl, summary.csv,
TensorBoard events, checkpoints/, metrics.json and report.md. Ctrl-C, SIGTERM and SIGUSR1 save at the next update and
end with exit status 0; Ctrl-C once more ends at once. Mistakes of the user end with one line on stderr and exit status
2.
"""

import argparse
import contextlib
import copy
import logging
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from yacs.config import CfgNode as CN

from ssm_train.answering import Answers, write_answers
from ssm_train.common import command
from ssm_train.common.distributed import World, joined_world, restarts
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import folder_lock
from ssm_train.common.machine import peak_memory_mb
from ssm_train.common.precision import resolve_amp
from ssm_train.common.preemption import StopRequest
from ssm_train.config.load import FLAG_KEYS, load_config
from ssm_train.continuation import find_checkpoint, refuse_existing_run
from ssm_train.data.build import close_workers, eval_loader, scan_split
from ssm_train.data.dataset import BadImages, Batch
from ssm_train.data.sources import FORMATS
from ssm_train.record.answers import EVALUATED, summary_line
from ssm_train.record.checkpoint import MODEL, MODEL_EMA, Checkpoint
from ssm_train.record.logger import RunLog
from ssm_train.record.progress import Passing
from ssm_train.record.results import better_weights, description, evaluation_metrics, origin, summary, write_metrics
from ssm_train.same_run import check_photographs
from ssm_train.settle import as_before, as_trained, with_classes, with_epochs, with_machine, with_own_classes
from ssm_train.start import Beginning, prepare
from ssm_train.step.evaluate import validate
from ssm_train.step.model import build_model
from ssm_train.step.parallel import load_whole
from ssm_train.step.pretrained import Loaded, Pretrained, start_from
from ssm_train.step.speed import inference_speed, training_speed
from ssm_train.trainer import train

_log = logging.getLogger(__name__)

# a set of weights -> its name in the results
_RECORDS = {"model": "model", "ema": "model_ema"}
_MEASURED_EPOCH = 1000  # updates; a measurement of speed has no epochs, but the schedule wants some


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None means "not given". UserError for unknown flags."""
    parser = _Parser(
        prog="classification/main.py", description="Train or evaluate an image classifier.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="e.g. configs/classification/vmamba/vmamba_tiny_s1l8.yaml")
    add("--opts", nargs="+", metavar="KEY VALUE", help="config keys and values, e.g. TRAIN.EPOCHS 100 MODEL.KWARGS.x 1")
    add("--data-path", metavar="FOLDER", help="holds train/<class>/* and val/<class>/*, or what --dataset names")
    add("--dataset", choices=tuple(FORMATS), help="how DATA_PATH is laid out (folder); photos: <class>/*, to be split")
    add("--zip", action="store_const", const="zip", dest="dataset", help="the same as --dataset zip")
    add("--cache-mode", choices=("no", "part", "full"), help="bytes of an archive to hold in memory")
    add("--img-size", type=int, metavar="S", help="side of the images in pixels")
    add("--epochs", type=int, metavar="N")
    add("--lr", type=float, metavar="RATE", help="TRAIN.BASE_LR, which most recipes give for 512 images an update")
    add("--batch-size", type=int, metavar="N", help="images per process and micro-step")
    add("--accumulation-steps", type=int, metavar="N", help="micro-steps per optimizer update")
    add("--output", metavar="FOLDER")
    add("--tag", metavar="NAME", help="the run folder is OUTPUT/TAG")
    add("--resume", metavar="P", help="a checkpoint folder, or auto: the newest valid one of the run folder")
    add("--fresh", action="store_true", help="set a run that the run folder holds aside, and start anew")
    add("--allow-changes", action="store_true", help="with --resume: go on with other data or options than before")
    add("--pretrained", metavar="P", help="start from: run or checkpoint folder, .safetensors, .pth, published name")
    add("--from-scratch", action="store_const", const="", dest="pretrained", help="begin with random weights")
    add("--which", choices=("model", "ema"), help="with --pretrained: plain or averaged weights (the better)")
    add("--allow-nonfinite", action="store_true", help="with --pretrained: take weights with nan or infinity, too")
    add(
        "--new-head",
        action="store_true",
        default=None,
        help="with --pretrained: keep a fresh classifier, for other classes",
    )
    add("--eval", action="store_true", help="validate the weights of --resume or --pretrained; no training")
    add("--throughput", action="store_true", help="measure inference images/s on synthetic images; no training")
    add("--traincost", action="store_true", help="measure training images/s and memory on synthetic images")
    add("--use-checkpoint", action="store_true", default=None, help="recompute activations to save memory")
    add("--optim", choices=("adamw", "sgd"))
    add("--model_ema", type=_switch, metavar="BOOL", help="False keeps no averaged weights")
    add("--model_ema_decay", type=float, metavar="D", help="decay of the averaged weights per update")
    add("--mesa", action="store_true", help="draw the model to its average's prediction (VSSD)")
    add("--mesa_value", type=float, metavar="W", help="weight of that, 1.0 with --mesa alone")
    add("--amp", choices=("auto", "bf16", "fp16", "off"))
    add("--disable_amp", action="store_const", const="off", dest="amp", help="the same as --amp off")
    add("--compile", action="store_true", default=None, help="torch.compile the model")
    add("--channels-last", action="store_true", default=None)
    add("--memory_limit_rate", type=float, metavar="SHARE", help="most GPU memory a process may take")
    add("--device", choices=("cpu", "cuda", "mps"))
    # torch.distributed.launch adds this; the environment variable LOCAL_RANK says the same for every launcher
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.eval and not (args.resume or args.pretrained):
        raise UserError("--eval needs weights: give --resume CHECKPOINT or --pretrained FILE")
    if args.new_head and args.eval:
        raise UserError("--new-head goes with --pretrained FILE, to train a fresh classifier on its features")
    if (args.which or args.allow_nonfinite) and not args.pretrained:
        raise UserError("--which and --allow-nonfinite go with --pretrained")
    if args.resume not in (None, "auto") and args.pretrained:
        raise UserError("give --resume CHECKPOINT or --pretrained, not both: a resumed run has its weights already")
    if args.fresh and (args.resume or args.eval):
        raise UserError("--fresh starts a run anew: it goes neither with --resume nor with --eval")
    if args.fresh and restarts():
        raise UserError(
            "--fresh would set aside what was trained before this restart: with torchrun's --max-restarts use --resume "
            "auto"
        )
    if args.allow_changes and (not args.resume or args.eval):
        raise UserError("--allow-changes goes with --resume, to train on")
    if args.model_ema is False:
        args.model_ema_decay = 0.0
    if args.mesa and args.mesa_value is None:
        args.mesa_value = 1.0
    return args


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return command.run(lambda: classify(argv))


def classify(argv: list[str] | None) -> None:
    """Read the command line and the config, join the processes, and do what is asked for."""
    args = parse_args(argv)
    args.command = shlex.join(["classification/main.py", *(sys.argv[1:] if argv is None else argv)])
    cfg = load_config(args.cfg, args.opts, {flag: getattr(args, flag) for flag in FLAG_KEYS})
    if args.new_head and not cfg.MODEL.PRETRAINED:
        raise UserError("--new-head goes with --pretrained FILE, to train a fresh classifier on its features")
    with (
        joined_world(cfg.DEVICE, cfg.MEMORY_SHARE, cfg.TIMEOUT) as world,
        world.together(lambda: RunLog(world.is_main, cfg.WANDB)) as log,
    ):
        run(args, cfg, world, log)


def run(args: argparse.Namespace, cfg: CN, world: World, log: RunLog) -> None:
    """Do what the arguments ask for. Nothing is written before data, model and weights have been found to be good."""
    world.together(lambda: resolve_amp(cfg.AMP, world.device))
    if args.throughput:
        report_throughput(settled_alone(cfg, world), world)
        return
    if args.traincost:
        report_training_cost(settled_alone(cfg, world), world)
        return
    folder = Path(cfg.OUTPUT) / cfg.TAG
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"run folder {folder}: TensorBoard needs a name in UTF-8; choose another") from error
    if not args.eval and not args.resume and not args.fresh:
        world.on_main(lambda: refuse_existing_run(folder))
    checkpoint = world.on_main(lambda: find_checkpoint(args, cfg, folder)) if args.resume else None
    if args.eval:
        evaluate(args, cfg, world, log, folder, checkpoint)
    else:
        beginning = Beginning(
            checkpoint=checkpoint,
            pretrained=_pretrained(args, cfg) if cfg.MODEL.PRETRAINED else None,
            fresh=args.fresh,
            allow_changes=args.allow_changes,
            command=args.command,
        )
        train(cfg, world, log, folder, beginning)


def _pretrained(args: argparse.Namespace, cfg: CN) -> Pretrained:
    new_head = cfg.MODEL.NEW_HEAD and not args.eval
    return Pretrained(Path(cfg.MODEL.PRETRAINED), args.which or "auto", new_head, args.allow_nonfinite)


def evaluate(
    args: argparse.Namespace, cfg: CN, world: World, log: RunLog, folder: Path, checkpoint: Checkpoint | None
) -> None:
    """Validate the weights of the checkpoint or of --pretrained, plain and averaged ones where there are both, and
    write metrics.json."""
    start = time.perf_counter()
    given = None if checkpoint else _pretrained(args, cfg)
    told = {*(args.opts or [])[::2], *(FLAG_KEYS[flag] for flag in FLAG_KEYS if getattr(args, flag) is not None)}
    cfg = world.together(lambda: as_trained(cfg, checkpoint or given.path, told))
    before = as_before(cfg, checkpoint)
    source = world.together(lambda: scan_split(before, "val"))
    for note in source.notes:
        _log.info("%s", note)
    if checkpoint is not None and before.DATA.DATASET == "photos":
        world.together(lambda: check_photographs(source, Path(before.DATA.DATA_PATH), checkpoint))
    cfg = with_machine(with_classes(before, len(source.classes)), world)
    network = world.together(lambda: build_model(cfg))
    pretrained = None
    if checkpoint is None:
        weights_of = str(args.pretrained)
        models, loaded = world.together(lambda: both_sets(network, cfg, given))
        pretrained = world.on_main(loaded.record)
    else:
        models, weights_of = {"model": network}, str(checkpoint.folder)
        world.together(lambda: load_whole(network, checkpoint.weights(MODEL, network)))
        if checkpoint.has_ema:
            models["model_ema"] = average = copy.deepcopy(network)
            world.together(lambda: load_whole(average, checkpoint.weights(MODEL_EMA, average)))
    memory_format = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    for model in models.values():
        model.to(world.device, memory_format=memory_format)
    amp = resolve_amp(cfg.AMP, world.device)
    with contextlib.ExitStack() as stack:
        world.on_main(lambda: open_folder(folder, log, stack))
        loader = eval_loader(cfg, source, world)
        stack.callback(close_workers, loader)
        bad = BadImages(world, len(source), None)
        answers = {name: Answers() for name in models}
        passing = Passing("evaluation", len(models) * len(loader))

        def watch(name: str, batch: Batch, logits: torch.Tensor) -> None:
            answers[name].add(batch, logits)
            passing()

        stop = StopRequest()
        validated = validate(models, loader, amp, world, bad, stop, memory_format=memory_format, watch=watch)
        records = {weights: asdict(accuracy) for weights, accuracy in validated.items()}
        seconds = time.perf_counter() - start
        found = answers[better_weights(records)].of_all(world)
        world.on_main(lambda: write_answers(folder, EVALUATED, source, found))
        _log.info("recognised worst: %s", summary_line(found, source.classes))
        _log.info("%s: %s; %d images left out; %.1f s", weights_of, summary(records), bad.count, seconds)
        common = {
            "excluded": bad.count,
            "seconds": seconds,
            "images_per_second": len(source) / seconds,
            "image_size": cfg.DATA.IMG_SIZE,
            "crop_ratio": cfg.DATA.CROP_RATIO,
            "interpolation": cfg.DATA.INTERPOLATION,
            **origin(args.command, pretrained),
            **description(cfg, world, network, amp),
        }
        world.on_main(lambda: write_metrics(folder, evaluation_metrics(records, weights_of, common)))


def both_sets(network: nn.Module, cfg: CN, weights: Pretrained) -> tuple[dict[str, nn.Module], Loaded]:
    """The networks to validate, `network` among them: of a file or folder with plain and averaged weights both, unless
    one set was asked for; and what was loaded into `network`."""
    loaded = start_from(network, cfg, weights)
    _log.info("weights from %s", loaded)
    models = {_RECORDS[loaded.taken]: network}
    for which in loaded.sets:
        if weights.which == "auto" and which != loaded.taken:
            models[_RECORDS[which]] = other = copy.deepcopy(network)
            _log.info("evaluated, too: %s", start_from(other, cfg, weights._replace(which=which)))
    return models, loaded


def open_folder(folder: Path, log: RunLog, stack: contextlib.ExitStack) -> None:
    """Create and lock the folder for the results of an evaluation (rank 0), or add to one that is there."""
    try:
        stack.enter_context(folder_lock(folder))
        log.open_text(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error


def settled_alone(cfg: CN, world: World) -> CN:
    """The config of a measurement without data."""
    settled = with_machine(world.together(lambda: with_own_classes(cfg)), world)
    return with_epochs(settled, _MEASURED_EPOCH)


def report_throughput(cfg: CN, world: World) -> None:
    """Print inference images/s of one process."""
    memory_format = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
    network = world.together(lambda: build_model(cfg)).to(world.device, memory_format=memory_format)
    amp = resolve_amp(cfg.AMP, world.device)
    speed = inference_speed(torch.compile(network) if cfg.COMPILE else network, cfg, amp, world)
    _log.info("throughput of %s: %.1f images/s (%s)", cfg.MODEL.NAME, speed, _conditions(cfg, amp, world))


def report_training_cost(cfg: CN, world: World) -> None:
    """Print training images/s of one process of the run, with its exchanges, and peak memory."""
    run = prepare(cfg, world, updates_per_epoch=_MEASURED_EPOCH)
    speed = training_speed(run, cfg, world)
    memory = peak_memory_mb(world.device)
    conditions = _conditions(cfg, run.amp, world)
    _log.info("training of %s: %.1f images/s, peak %.0f MB (%s)", cfg.MODEL.NAME, speed, memory, conditions)


def _conditions(cfg: CN, amp: str, world: World) -> str:
    size = cfg.DATA.IMG_SIZE
    how = f"median of 5; batch {cfg.DATA.BATCH_SIZE}, {size}x{size}, amp {amp}, {world.device}"
    return how + (", compiled" if cfg.COMPILE else "") + (", channels last" if cfg.CHANNELS_LAST else "")
