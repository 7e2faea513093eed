"""A training run: everything built from the config, the loop over epochs, saving and continuing."""

import logging
from pathlib import Path

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch.utils.data import DataLoader
from yacs.config import CfgNode as CN

from classification.checkpoint import MODEL, MODEL_EMA, Checkpoint, CheckpointStore
from classification.data.build import check_same_classes, eval_loader, scan_split, train_loader
from classification.data.dataset import BadImages
from classification.data.transforms import build_mixup
from classification.distributed import World
from classification.engine import Training, train_one_epoch, validate
from classification.errors import UserError
from classification.fileio import write_atomic
from classification.logger import RunLog, versions
from classification.lr_scheduler import build_scheduler, resolve_rates
from classification.model import build_model, count_parameters, load_pretrained, parallel
from classification.optimizer import build_optimizer, decay_counts, load_state_by_name, state_by_name
from classification.results import Results, better_weights, description, summary, training_metrics, write_metrics
from classification.seeding import seed_init

_log = logging.getLogger(__name__)


def train(
    cfg: CN,
    world: World,
    log: RunLog,
    folder: Path,
    checkpoint: Checkpoint | None,
    pretrained: Path | None,
    new_head: bool,
) -> None:
    """Train to the last epoch, validating and saving after each, and write metrics.json into the run folder.

    Continues from `checkpoint`, or starts from the weights of `pretrained` (but for its classifier with `new_head`), or
    from scratch. The run folder is created when data, model and weights have been found to be good.
    """
    train_found, val_found = world.together(lambda: (scan_split(cfg, "train"), scan_split(cfg, "val")))
    world.together(lambda: check_same_classes(train_found, val_found))
    loader = world.together(lambda: train_loader(cfg, train_found, world))
    val_loader = eval_loader(cfg, val_found, world)
    updates_per_epoch = loader.batch_sampler.updates_per_epoch
    training = world.together(lambda: prepare(cfg, world, updates_per_epoch, checkpoint, pretrained, new_head))
    # with the weights in place, and with all ranks alive: the wrapper sends those of rank 0 to all
    training.parallel = parallel(training.network, world)
    store = CheckpointStore(folder / "checkpoints", cfg.TRAIN.KEEP_CHECKPOINTS)
    results = Results(checkpoint.meta["results"] if checkpoint else None)
    world.on_main(lambda: _open_run(folder, store, cfg, log, training.updates, checkpoint, results))
    bad_train = BadImages(world, len(train_found.samples), cfg.DATA.MAX_BAD_IMAGES)
    bad_val = BadImages(world, len(val_found.samples), None)
    for epoch in range(checkpoint.meta["epoch"] if checkpoint else 0, cfg.TRAIN.EPOCHS):
        train_one_epoch(training, loader, epoch, cfg, world, log, bad_train)
        _finish_epoch(training, val_loader, epoch + 1, cfg, world, log, bad_val, results, store)
    metrics = training_metrics(
        results,
        {
            "seconds": training.elapsed(),
            "images_per_second": training.train_images / training.train_seconds,
            "epochs": cfg.TRAIN.EPOCHS,
            **description(cfg, world, training.network),
        },
    )
    path = world.on_main(lambda: write_metrics(folder, metrics))
    seconds, top1, best = metrics["seconds"], metrics["top1"], metrics["checkpoint"]
    _log.info("done in %.0f s: top-1 %.2f%% with %s (epoch %d); see %s", seconds, top1, best, metrics["epoch"], path)


def prepare(
    cfg: CN,
    world: World,
    updates_per_epoch: int,
    checkpoint: Checkpoint | None,
    pretrained: Path | None,
    new_head: bool,
) -> Training:
    """Model (not yet parallel), average, optimizer and schedule. Raises UserError for weights of another model."""
    seed_init(cfg.SEED)
    network = build_model(cfg)
    if checkpoint is None and pretrained is not None:
        _log.info("weights from %s", load_pretrained(network, pretrained, new_head))
    network.to(world.device)
    images_per_update = cfg.DATA.BATCH_SIZE * world.size * cfg.TRAIN.ACCUMULATION_STEPS
    rates = resolve_rates(cfg.TRAIN, images_per_update)
    optimizer = build_optimizer(network, cfg.TRAIN, rates.base)
    training = Training(
        network=network,
        parallel=network,
        ema=ModelEmaV3(network, decay=cfg.TRAIN.EMA_DECAY) if cfg.TRAIN.EMA_DECAY else None,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, cfg.TRAIN, rates, updates_per_epoch),
        updates_per_epoch=updates_per_epoch,
        scaler=torch.amp.GradScaler(world.device.type, enabled=cfg.AMP == "fp16"),
        mixup=build_mixup(cfg),
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
    )
    if checkpoint is not None:
        restore(training, checkpoint)
    _log.info(
        "%s: %.3f M parameters, %d tensors with weight decay, %d without; %s, amp %s, %d process(es)",
        cfg.MODEL.NAME,
        count_parameters(network) / 1e6,
        *decay_counts(optimizer),
        world.device,
        cfg.AMP,
        world.size,
    )
    _log.info(
        "learning rate %.4g (warm-up from %.4g, down to %.4g) for %d images per update, %d updates per epoch",
        rates.base,
        rates.warmup,
        rates.minimum,
        images_per_update,
        updates_per_epoch,
    )
    return training


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Continue exactly where `checkpoint` was written."""
    checkpoint.load_weights(MODEL, training.network)
    if training.ema is not None and checkpoint.has_ema:
        checkpoint.load_weights(MODEL_EMA, training.ema.module)
    elif training.ema is not None:
        _log.warning("%s has no averaged weights; averaging starts from its plain weights", checkpoint.folder)
        training.ema.set(training.network)
    state = checkpoint.train_state()
    load_state_by_name(training.network, training.optimizer, state["optimizer"])
    if state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    training.updates = state["updates"]
    if state["updates_per_epoch"] != training.updates_per_epoch:
        training.updates = checkpoint.meta["epoch"] * training.updates_per_epoch
        _log.warning("updates per epoch were %d, the schedule continues by epochs", state["updates_per_epoch"])
    training.scheduler.step_update(training.updates)
    training.train_images = checkpoint.meta["progress"]["train_images"]
    training.train_seconds = checkpoint.meta["progress"]["train_seconds"]
    training.seconds = checkpoint.meta["progress"]["seconds"]
    _log.info("resumed after epoch %d from %s", checkpoint.meta["epoch"], checkpoint.folder)


def _open_run(
    folder: Path,
    store: CheckpointStore,
    cfg: CN,
    log: RunLog,
    updates: int,
    checkpoint: Checkpoint | None,
    results: Results,
) -> None:
    """Create the run folder, start its logs, and make its checkpoints agree with `results` (rank 0)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", cfg.dump())
        log.open_text(folder)
        log.open_series(folder, updates)
    except OSError as error:
        raise UserError(f"cannot write to run folder {folder} ({error.strerror}): choose another --output") from error
    store.clean()
    if checkpoint is not None:
        if checkpoint.folder.parent != store.folder.resolve():
            store.adopt(checkpoint)
        results.forget_missing(store.epochs())
        # a process killed after saving and before linking left the older links
        store.link(results.links())


def _finish_epoch(
    training: Training,
    val_loader: DataLoader,
    epoch: int,
    cfg: CN,
    world: World,
    log: RunLog,
    bad: BadImages,
    results: Results,
    store: CheckpointStore,
) -> None:
    """Validate plain and averaged weights, log, and save with the bests known. `epoch` counts from 1."""
    models = {"model": training.network} | ({"model_ema": training.ema.module} if training.ema else {})
    if world.size > 1:
        for model in models.values():
            # running statistics are each rank's own; those of rank 0 are saved, so they are evaluated
            distribute_bn(model, world.size)
    validated = validate(models, val_loader, cfg, world, bad)
    results.add(epoch, validated)
    values = {"epoch": epoch, "images": validated["model"].images, "excluded": bad.count}
    for weights, accuracy in validated.items():
        prefix = "ema_" if weights == "model_ema" else ""
        values |= {f"{prefix}top1": accuracy.top1, f"{prefix}top5": accuracy.top5, f"{prefix}loss": accuracy.loss}
    log.record("val", training.updates, values)
    bests = ", ".join(f"{weights} {r['top1']:.2f}% (epoch {r['epoch']})" for weights, r in results.bests().items())
    _log.info("epoch %d/%d validation: %s; best: %s", epoch, cfg.TRAIN.EPOCHS, summary(results.latest()), bests)
    world.on_main(lambda: _save(training, epoch, cfg, results, store))


def _save(training: Training, epoch: int, cfg: CN, results: Results, store: CheckpointStore) -> None:
    store.save(
        epoch,
        model=training.network,
        ema=training.ema.module if training.ema else None,
        train_state={
            "optimizer": state_by_name(training.network, training.optimizer),
            "scaler": training.scaler.state_dict(),
            "updates": training.updates,
            "updates_per_epoch": training.updates_per_epoch,
        },
        meta={
            "results": results.records,
            "weights": better_weights(results.latest()),
            "progress": {
                "train_images": training.train_images,
                "train_seconds": training.train_seconds,
                "seconds": training.elapsed(),
            },
            "config": cfg.dump(),
            "versions": versions(),
        },
    )
    store.link(results.links())
