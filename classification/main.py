"""Train or evaluate an image classifier.

    python classification/main.py --cfg FILE --data-path FOLDER --output FOLDER [--tag NAME] [--batch-size N] ...
    torchrun --nproc_per_node=2 classification/main.py ...           (or python -m torch.distributed.launch)

The run folder is OUTPUT/TAG, or OUTPUT without --tag. It receives config.yaml, log.txt, log.jsonl, TensorBoard events,
checkpoints/ and metrics.json. Mistakes of the user end with one line on stderr and exit status 2.
"""

import argparse
import copy
import logging
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from yacs.config import CfgNode as CN

from classification.checkpoint import MODEL, MODEL_EMA, Checkpoint, CheckpointStore, read_checkpoint
from classification.config import FLAG_KEYS, load_config, model_differences, parse_config
from classification.data.build import eval_loader, scan_split
from classification.data.dataset import BadImages
from classification.distributed import World, is_local_main, joined_world
from classification.engine import measure_throughput, validate
from classification.errors import UserError
from classification.fileio import is_disk_full
from classification.logger import RunLog
from classification.model import build_model, check_precision, load_pretrained
from classification.results import description, evaluation_metrics, summary, write_metrics
from classification.trainer import train

# not __name__, which is "__main__" when this file is run
_log = logging.getLogger("classification.main")

_GRACE_SECONDS = 5


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None means "not given". UserError for unknown flags."""
    parser = _Parser(prog="classification/main.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="e.g. configs/classification/vmamba/vmamba_tiny_s1l8.yaml")
    add("--opts", nargs="+", metavar="KEY VALUE", help="config keys and values, e.g. TRAIN.EPOCHS 100 MODEL.KWARGS.x 1")
    add("--data-path", metavar="FOLDER", help="holds train/<class>/* and val/<class>/*")
    add("--batch-size", type=int, metavar="N", help="images per process and micro-step")
    add("--accumulation-steps", type=int, metavar="N", help="micro-steps per optimizer update")
    add("--output", metavar="FOLDER")
    add("--tag", metavar="NAME", help="the run folder is OUTPUT/TAG")
    add("--resume", metavar="P", help="a checkpoint folder, or auto: the newest valid one of the run folder")
    add("--pretrained", metavar="P", help="start from these weights: checkpoint folder, .safetensors, official .pth")
    add("--new-head", action="store_true", help="with --pretrained: keep a fresh classifier, for other classes")
    add("--eval", action="store_true", help="validate the weights of --resume or --pretrained; no training")
    add("--throughput", action="store_true", help="measure inference images/s on synthetic images; no training")
    add("--use-checkpoint", action="store_true", default=None, help="recompute activations to save memory")
    add("--amp", choices=("bf16", "fp16", "off"))
    add("--device", choices=("cpu", "cuda"))
    # torch.distributed.launch adds this; the environment variable LOCAL_RANK says the same for every launcher
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.eval and not (args.resume or args.pretrained):
        raise UserError("--eval needs weights: give --resume CHECKPOINT or --pretrained FILE")
    if args.new_head and (args.eval or not args.pretrained):
        raise UserError("--new-head goes with --pretrained FILE, to train a fresh classifier on its features")
    if args.resume not in (None, "auto") and args.pretrained:
        raise UserError("give --resume CHECKPOINT or --pretrained, not both: a resumed run has its weights already")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    try:
        args = parse_args(argv)
        cfg = load_config(args.cfg, args.opts, {flag: getattr(args, flag) for flag in FLAG_KEYS})
        with joined_world(cfg.DEVICE) as world, RunLog(world.is_main) as log:
            run(args, cfg, world, log)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = error.filename or "the logs"
        message = f"no room left to write {where} ({error.strerror}): free some space and continue with --resume auto"
    else:
        return 0
    if is_local_main():
        print(f"error: {message}", file=sys.stderr)
    else:
        # a launcher kills all processes as soon as one has ended: leave the one that speaks the time to do it
        time.sleep(_GRACE_SECONDS)
    return 2


def run(args: argparse.Namespace, cfg: CN, world: World, log: RunLog) -> None:
    """Do what the arguments ask for. Nothing is written before data, model and weights have been found to be good."""
    world.together(lambda: check_precision(cfg.AMP, world.device))
    if args.throughput:
        report_throughput(cfg, world)
        return
    folder = Path(cfg.OUTPUT) / cfg.TAG
    if not args.eval and not args.resume:
        world.on_main(lambda: refuse_existing_run(folder))
    checkpoint = world.on_main(lambda: find_checkpoint(args, cfg, folder)) if args.resume else None
    if args.eval:
        evaluate(args, cfg, world, log, folder, checkpoint)
    else:
        pretrained = Path(args.pretrained) if args.pretrained else None
        train(cfg, world, log, folder, checkpoint, pretrained, args.new_head)


def refuse_existing_run(folder: Path) -> None:
    """UserError where `folder` holds a run that a new one would overwrite."""
    for name in ("checkpoints", "log.jsonl", "log.txt", "metrics.json"):
        if (folder / name).exists():
            raise UserError(
                f"{folder} already holds a run ({name}): choose another --tag or --output, or add --resume auto"
            )


def find_checkpoint(args: argparse.Namespace, cfg: CN, folder: Path) -> Checkpoint | None:
    """The checkpoint that --resume means, verified and for the configured model; None to start from scratch."""
    store = CheckpointStore(folder / "checkpoints", cfg.TRAIN.KEEP_CHECKPOINTS)
    checkpoint = store.newest_valid() if args.resume == "auto" else read_checkpoint(Path(args.resume))
    if checkpoint is None:
        if args.eval and not args.pretrained:
            raise UserError(
                f"--resume auto: {store.folder} holds no valid checkpoint to evaluate; give --resume CHECKPOINT"
            )
        source = args.pretrained or "scratch"
        _log.info("--resume auto: %s holds no valid checkpoint, starting from %s", store.folder, source)
        return None
    differing = model_differences(parse_config(checkpoint.meta["config"]), cfg)
    if differing:
        raise UserError(
            f"checkpoint {checkpoint.folder} is of another model than the config: {'; '.join(differing[:3])} "
            "(checkpoint -> config); use the config it was trained with"
        )
    if args.resume != "auto" and not args.eval:
        check_continuation(checkpoint, store, folder)
    return checkpoint


def check_continuation(checkpoint: Checkpoint, store: CheckpointStore, folder: Path) -> None:
    """UserError where continuing from `checkpoint` in `folder` would overwrite later epochs or mix two runs."""
    if checkpoint.folder.parent != store.folder.resolve():
        refuse_existing_run(folder)
    newest, epoch = max(store.epochs(), default=0), checkpoint.meta["epoch"]
    if newest > epoch:
        raise UserError(
            f"{store.folder} goes on to epoch {newest}; resuming from epoch {epoch} would overwrite that: choose "
            "another --tag or --output for the new branch, or use --resume auto"
        )


def evaluate(
    args: argparse.Namespace, cfg: CN, world: World, log: RunLog, folder: Path, checkpoint: Checkpoint | None
) -> None:
    """Validate the weights of the checkpoint (plain and averaged) or of --pretrained, and write metrics.json."""
    start = time.perf_counter()
    found = world.together(lambda: scan_split(cfg, "val"))
    network = world.together(lambda: build_model(cfg))
    models, source = {"model": network}, str(args.pretrained)
    if checkpoint is None:
        _log.info("weights from %s", world.together(lambda: load_pretrained(network, Path(args.pretrained))))
    else:
        source = str(checkpoint.folder)
        world.together(lambda: checkpoint.load_weights(MODEL, network))
        if checkpoint.has_ema:
            models["model_ema"] = copy.deepcopy(network)
            world.together(lambda: checkpoint.load_weights(MODEL_EMA, models["model_ema"]))
    for model in models.values():
        model.to(world.device)
    world.on_main(lambda: open_folder(folder, log))
    loader = eval_loader(cfg, found, world)
    bad = BadImages(world, len(found.samples), None)
    validated = validate(models, loader, cfg, world, bad)
    records = {weights: asdict(accuracy) for weights, accuracy in validated.items()}
    seconds = time.perf_counter() - start
    _log.info("%s: %s; %d images left out; %.1f s", source, summary(records), bad.count, seconds)
    common = {
        "excluded": bad.count,
        "seconds": seconds,
        "images_per_second": len(found.samples) / seconds,
        **description(cfg, world, network),
    }
    world.on_main(lambda: write_metrics(folder, evaluation_metrics(records, source, common)))


def open_folder(folder: Path, log: RunLog) -> None:
    """Create the folder for the results of an evaluation (rank 0), or add to one that is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.open_text(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --output") from error


def report_throughput(cfg: CN, world: World) -> None:
    """Print inference images/s of one process."""
    network = world.together(lambda: build_model(cfg)).to(world.device)
    speed = measure_throughput(network, cfg, world.device)
    size = cfg.DATA.IMG_SIZE
    _log.info(
        "throughput of %s: %.1f images/s (median of 5; batch %d, %dx%d, amp %s, %s)",
        cfg.MODEL.NAME,
        speed,
        cfg.DATA.BATCH_SIZE,
        size,
        size,
        cfg.AMP,
        world.device,
    )


if __name__ == "__main__":
    sys.exit(main())
