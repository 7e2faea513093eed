"""A training run: the loop over epochs and updates, when it saves, and how it goes on after a stop."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode as CN

from ssm_train.answering import Answers, write_answers
from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.common.fileio import to_json, write_atomic
from ssm_train.common.machine import peak_memory_mb, versions
from ssm_train.common.preemption import Preempted, StopRequest
from ssm_train.common.seeding import seed_step
from ssm_train.data.build import check_same_classes, close_workers, eval_loader, scan_split, train_loader
from ssm_train.data.dataset import BadImages, Batch
from ssm_train.data.prefetch import DeviceBatches
from ssm_train.data.sources import ImageSource
from ssm_train.next_steps import next_commands
from ssm_train.record.answers import TRAINED, summary_line
from ssm_train.record.checkpoint import Checkpoint, Position, read_checkpoint
from ssm_train.record.guard import Guard, MicroStep, write_dump
from ssm_train.record.logger import RunLog
from ssm_train.record.progress import Passing, Progress
from ssm_train.record.report import write_report
from ssm_train.record.results import (
    Results,
    better_weights,
    description,
    origin,
    summary,
    training_metrics,
    write_metrics,
)
from ssm_train.run_folder import RunFolder
from ssm_train.same_run import check_ranks, check_resumed, fingerprint
from ssm_train.settle import as_before, asked_batch, with_classes, with_epochs, with_machine
from ssm_train.start import Beginning, images_per_update, place, prepare, same_updates, weights_record
from ssm_train.step.engine import Training, Update, forget_update, take_update, training_loss
from ssm_train.step.evaluate import Accuracy, Interrupted, validate
from ssm_train.step.losses import mesa_starts
from ssm_train.step.meter import Meter
from ssm_train.step.model import set_train_mode
from ssm_train.step.parallel import exchange, load_whole
from ssm_train.step.state import collect, restore

_log = logging.getLogger(__name__)


def train(cfg: CN, world: World, log: RunLog, path: Path, beginning: Beginning) -> None:
    """Train to the last epoch, validating and saving after each, and write metrics.json into the run folder.

    The run folder `path` is created when data, model and weights have been found to be good. Raises Preempted when it
    saved and stopped because a signal asked for it.
    """
    checkpoint, asked = beginning.checkpoint, asked_batch(cfg)
    before = as_before(cfg, checkpoint)
    source = world.together(lambda: scan_split(before, "train"))
    counted = with_classes(before, len(source.classes))
    val_source = world.together(lambda: scan_split(counted, "val"))
    # of photographs that are yet to be split, both say the same
    for note in dict.fromkeys((*source.notes, *val_source.notes)):
        _log.info("%s", note)
    world.together(lambda: check_same_classes(source, val_source))
    settled = with_machine(counted, world, len(source))
    cfg = world.together(lambda: same_updates(settled, checkpoint, world, asked))
    cfg = with_epochs(cfg, max(1, len(source) // images_per_update(cfg, world)))
    root = Path(cfg.DATA.DATA_PATH)
    data = {"train": fingerprint(source, root), "val": fingerprint(val_source, root)}
    check_ranks(world, cfg, data)
    check_resumed(cfg, data, images_per_update(cfg, world), checkpoint, beginning.allow_changes)
    loader = world.together(lambda: train_loader(cfg, source, world))
    updates_per_epoch = loader.batch_sampler.updates_per_epoch
    run = prepare(cfg, world, updates_per_epoch, checkpoint, beginning.pretrained)
    val_loader = eval_loader(cfg, val_source, world)
    facts = {
        "processes": world.size,
        "asked_batch": asked,
        "images_per_update": images_per_update(cfg, world),
        "data": data,
        "classes": {name: label for label, name in enumerate(source.classes)},
        "config": cfg.dump(),
        **origin(beginning.command, world.on_main(lambda: weights_record(run, checkpoint))),
        "versions": versions(),
    }
    folder = RunFolder(path, cfg.TRAIN.KEEP_CHECKPOINTS, facts)
    stop = StopRequest()
    with stop.listening(), contextlib.ExitStack() as stack:
        stack.callback(close_workers, loader, val_loader)
        trainer = Trainer(cfg, world, log, folder, run, source, val_source, loader, val_loader, stop)
        trainer.open(checkpoint, beginning.fresh, stack)
        stack.enter_context(trainer.progress)
        trainer.train()


class Trainer:
    """The parts of a run and its position."""

    def __init__(
        self,
        cfg: CN,
        world: World,
        log: RunLog,
        folder: RunFolder,
        run: Training,
        source: ImageSource,
        val_source: ImageSource,
        loader: DataLoader,
        val_loader: DataLoader,
        stop: StopRequest,
    ) -> None:
        self.cfg, self.world, self.log, self.folder, self.run, self.stop = cfg, world, log, folder, run, stop
        self.source, self.val_source, self.loader, self.val_loader = source, val_source, loader, val_loader
        self.updates_per_epoch = loader.batch_sampler.updates_per_epoch
        self.memory_format = torch.channels_last if cfg.CHANNELS_LAST else torch.contiguous_format
        self.batches = DeviceBatches(loader, world.device, self.memory_format)
        self.results = Results()
        self.guard = Guard(cfg.TRAIN.MAX_NONFINITE, cfg.TRAIN.MAX_ROLLBACKS)
        self.bad = BadImages(world, len(source), cfg.DATA.MAX_BAD_SHARE)
        self.bad_val = BadImages(world, len(val_loader.dataset), None)
        self.progress = Progress(world, cfg)
        self.recorded = 0  # updates up to which the logs of an earlier process are continued
        self.mesa_from = mesa_starts(cfg) if cfg.TRAIN.MESA else cfg.TRAIN.EPOCHS
        self.position = Position(0)

    def open(self, checkpoint: Checkpoint | None, fresh: bool, stack: contextlib.ExitStack) -> None:
        """Take up the position and open the run folder until `stack` ends, see `RunFolder.open`; then start the logs in
        it."""
        per_update = images_per_update(self.cfg, self.world)
        self.position = self.world.together(lambda: place(checkpoint, self.updates_per_epoch, per_update))
        if checkpoint is not None:
            progress = checkpoint.meta["progress"]
            self.run.train_images, self.run.train_seconds = progress["train_images"], progress["train_seconds"]
            self.run.seconds = progress["seconds"]
            self.guard.load(checkpoint.meta["guard"])
            self.results = Results(checkpoint.meta["results"])
            self.bad.load(checkpoint.meta["bad_images"])
            self.recorded = checkpoint.meta["updates"]
            if checkpoint.meta["images_per_update"] != per_update:
                _log.warning("images per update were %d, now %d", checkpoint.meta["images_per_update"], per_update)
        splits = {"train": self.source, "val": self.val_source}
        self.world.on_main(lambda: self.folder.open(checkpoint, self.results, fresh, stack))
        self.world.on_main(lambda: self.folder.write_config(splits, self.cfg.DATA.DATA_PATH))
        if checkpoint is None:
            # before the logs: from then on there is a checkpoint to go back to, at every moment
            self._save()
        self.world.on_main(self._open_logs)
        if checkpoint is None:
            self._event("started", **{name: str(value) for name, value in self._origin().items()})
        else:
            _log.info("resumed after %s from %s", self.position, checkpoint.folder)
            command = self.folder.facts["command"]
            self._event("resumed", epoch=self.position.epoch, slot=self.position.update, command=command)

    def _open_logs(self) -> None:
        with self.folder.writing():
            self.log.open_text(self.folder.path)
            self.log.open_series(self.folder.path, self.recorded)

    def train(self) -> None:
        """From the position to the end of the last epoch; then metrics.json."""
        try:
            while self.position.epoch < self.cfg.TRAIN.EPOCHS:
                self.train_epoch()
                self._finish_epoch()
        except Interrupted:
            self._save()
            self._preempted()
        try:
            self._answer()
        except Interrupted:
            # all is saved, and the weights in memory are those of the best epoch
            self._preempted()
        metrics = training_metrics(
            self.results,
            {
                "seconds": self.run.elapsed(),
                "images_per_second": self.run.train_images / self.run.train_seconds,
                "epochs": self.cfg.TRAIN.EPOCHS,
                "skipped_updates": self.guard.skipped,
                "rollbacks": self.guard.rollbacks,
                "bad_images": self.bad.count,
                **self._origin(),
                **description(self.cfg, self.world, self.run.network, self.run.amp),
            },
        )
        path = self.world.on_main(lambda: self._write_results(metrics))
        _log.info(
            "done in %.0f s: top-1 %.2f%% with %s (epoch %d); see %s",
            metrics["seconds"],
            metrics["top1"],
            metrics["checkpoint"],
            metrics["epoch"],
            path,
        )
        for what, line in next_commands(self.folder.path, self.val_source):
            _log.info("%s: %s", what, line)

    def _write_results(self, metrics: dict) -> Path:
        bad = self.bad.state()
        if bad:
            write_atomic(self.folder.path / "bad_images.json", to_json(bad, indent=1, sort_keys=True) + "\n")
            _log.warning("%d unreadable training images were replaced; bad_images.json lists them", len(bad))
        write_metrics(self.folder.path, metrics)
        return write_report(self.folder.path)

    def _answer(self) -> None:
        """Write down what the best weights say of every validation image. Raises Interrupted."""
        bests = self.results.bests()
        weights = better_weights(bests)
        place = self.folder.checkpoint(Position(int(bests[weights]["epoch"])))
        try:
            checkpoint = self.world.on_main(lambda: read_checkpoint(place))
            tensors = self.world.together(lambda: checkpoint.weights(f"{weights}.safetensors", self.run.network))
        except UserError as error:
            _log.warning("no answers for single images: %s", error)
            return
        load_whole(self.run.network, tensors)
        answers, passing = Answers(), Passing("the best weights once more", len(self.val_loader))

        def watch(name: str, batch: Batch, logits: torch.Tensor) -> None:
            answers.add(batch, logits)
            passing()

        self._validate({"model": self.run.network}, watch)
        found = answers.of_all(self.world)
        self.world.on_main(lambda: write_answers(self.folder.path, TRAINED, self.val_source, found))
        _log.info("recognised worst: %s", summary_line(found, self.val_source.classes))

    def train_epoch(self) -> None:
        """The updates from the position to the end of its epoch. Raises Preempted, and UserError for too many bad
        images and for a run that diverges."""
        cfg, run = self.cfg, self.run
        epoch, first = self.position
        set_train_mode(run.parallel)
        self.loader.batch_sampler.set_position(epoch, first)
        accumulation = cfg.TRAIN.ACCUMULATION_STEPS
        batches = iter(self.batches)
        meter = Meter(self.world)
        self.progress.epoch(epoch + 1, self.updates_per_epoch * accumulation, first * accumulation)
        for slot in range(first, self.updates_per_epoch):
            rate = max(group["lr"] for group in run.optimizer.param_groups)
            steps, losses = [], []
            statistics = [buffer.clone() for buffer in run.statistics]
            for part in range(accumulation):
                with meter.waiting():
                    batch = next(batches)
                self.bad.add(batch.bad, batch.hopeless)
                loss = self._micro_step(epoch, slot * accumulation + part, part + 1 == accumulation, batch)
                meter.add(loss, len(batch.images))
                steps.append(batch)
                losses.append(loss)
                run.steps_here += 1
                self.progress.step(len(batch.images), self._seconds_left)
                if self.stop and self.world.size == 1 and part + 1 < accumulation:
                    forget_update(run, statistics)
                    raise Interrupted
            update = take_update(run, self.world, losses=losses, stop=bool(self.stop), statistics=statistics)
            self.position = Position(epoch, slot + 1)
            if update.made:
                self.guard.made()
            elif not update.overflow:
                self._skip(update, slot, steps, losses)
            # as many lines as micro-steps over PRINT_FREQ
            before, now = slot * accumulation // cfg.PRINT_FREQ, (slot + 1) * accumulation // cfg.PRINT_FREQ
            due = now > before or slot + 1 == self.updates_per_epoch
            if due:
                self.progress.show(self._measure(meter, rate, update))
            if update.stop:
                self._save()
                self._preempted()
            if self._save_is_due(slot + 1):
                with meter.paused():
                    self._save()

    def _seconds_left(self) -> float:
        """Of the run, by the speed of this process so far."""
        cfg, run = self.cfg, self.run
        slots = (cfg.TRAIN.EPOCHS - self.position.epoch) * self.updates_per_epoch - self.position.update
        return (time.perf_counter() - run.started) / run.steps_here * slots * cfg.TRAIN.ACCUMULATION_STEPS

    def _save_is_due(self, slots: int) -> bool:
        """Whether to save inside the epoch, `slots` updates into it; not while updates are being skipped."""
        every = self.cfg.TRAIN.SAVE_UPDATES
        return every > 0 and slots % every == 0 and slots < self.updates_per_epoch and self.guard.in_a_row == 0

    def _micro_step(self, epoch: int, step: int, closing: bool, batch: Batch) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns the detached loss. `step` counts within the epoch."""
        run, cfg = self.run, self.cfg
        seed_step(*self._seed(epoch, step))
        with exchange(run.parallel, closing):
            loss = training_loss(run, batch.images, batch.targets, mesa=epoch >= self.mesa_from)
            run.scaler.scale(loss / cfg.TRAIN.ACCUMULATION_STEPS).backward()
        return loss.detach()

    def _seed(self, epoch: int, step: int) -> tuple[int, int, int]:
        """The seed of a micro-step, counted over the whole run."""
        steps_per_epoch = self.updates_per_epoch * self.cfg.TRAIN.ACCUMULATION_STEPS
        return self.cfg.SEED, epoch * steps_per_epoch + step, self.world.rank

    def _skip(self, update: Update, slot: int, batches: list[Batch], losses: list[torch.Tensor]) -> None:
        """Write down an update that was not finite; roll back after too many in a row."""
        self._check_folder()
        epoch, accumulation = self.position.epoch, self.cfg.TRAIN.ACCUMULATION_STEPS
        steps = [
            MicroStep(
                seed=self._seed(epoch, slot * accumulation + part),
                loss=loss.item(),
                images=[self.source.name(key.index) for key in batch.keys],
                keys=[tuple(key) for key in batch.keys],
            )
            for part, (batch, loss) in enumerate(zip(batches, losses, strict=True))
        ]
        name = f"{self.position.name}_rank{self.world.rank}"
        where = {"epoch": epoch, "slot": slot, "updates": self.run.updates, "grad_norm": update.norm}
        write_dump(self.folder.path, name, where, steps)
        self._event("skipped", epoch=epoch, slot=slot, grad_norm=str(update.norm))
        _log.warning(
            "update %d of epoch %d skipped: loss %s, gradient norm %s; see nonfinite/%s.json",
            slot + 1,
            epoch + 1,
            steps[-1].loss,
            update.norm,
            name,
        )
        if self.guard.skip():
            self._roll_back()

    def _roll_back(self) -> None:
        """Back to the last checkpoint, but for the data, which go on: the same ones would end the same."""
        checkpoint = self.world.on_main(self.folder.store.newest_valid)
        if checkpoint is None:
            raise UserError(
                f"{self.guard.max_in_a_row + 1} updates in a row were not finite, and no checkpoint in "
                f"{self.folder.store.folder} is as it was written: lower TRAIN.BASE_LR or use --amp off"
            )
        restore(self.run, checkpoint, images_per_update(self.cfg, self.world))
        self._event("rolled_back", epoch=self.position.epoch, slot=self.position.update, to=checkpoint.position.name)
        _log.warning("rolled back to %s; the data go on from %s", checkpoint.folder, self.position)

    def _measure(self, meter: Meter, rate: float, update: Update) -> dict[str, float]:
        """What a line of progress says; recorded in the logs. All ranks must call it."""
        cfg, run = self.cfg, self.run
        accumulation = cfg.TRAIN.ACCUMULATION_STEPS
        iteration = self.position.update * accumulation
        self._check_folder()
        self.bad.share()
        values = meter.finish(run)
        values |= {"lr": rate, "grad_norm": update.norm, "eta_seconds": self._seconds_left()}
        values["memory_mb"] = peak_memory_mb(self.world.device)
        if run.scaler.is_enabled():
            values["loss_scale"] = run.scaler.get_scale()
        self.log.record("train", run.updates, {"epoch": self.position.epoch + 1, "iteration": iteration, **values})
        return values

    def _finish_epoch(self) -> None:
        """Validate plain and averaged weights, log, and save with the bests known."""
        run = self.run
        epoch = self.position.epoch + 1
        models = {"model": run.network} | ({"model_ema": run.ema.module} if run.ema else {})
        passing = Passing("validation", len(models) * len(self.val_loader))
        validated = self._validate(models, lambda name, batch, logits: passing())
        self._check_folder()
        self.results.add(epoch, validated)
        values = {"epoch": epoch, "images": validated["model"].images, "excluded": self.bad_val.count}
        for weights, accuracy in validated.items():
            prefix = "ema_" if weights == "model_ema" else ""
            values |= {f"{prefix}top1": accuracy.top1, f"{prefix}top5": accuracy.top5, f"{prefix}loss": accuracy.loss}
        values["seconds"] = run.elapsed()
        self.log.record("val", run.updates, values)
        bests = self.results.bests().items()
        best = ", ".join(f"{weights} {record['top1']:.2f}% (epoch {record['epoch']})" for weights, record in bests)
        latest = summary(self.results.latest())
        _log.info("epoch %d/%d validation: %s; best: %s", epoch, self.cfg.TRAIN.EPOCHS, latest, best)
        self.position = Position(epoch)
        self._save()

    def _validate(
        self, models: dict[str, nn.Module], watch: Callable[[str, Batch, torch.Tensor], None]
    ) -> dict[str, Accuracy]:
        return validate(
            models,
            self.val_loader,
            self.run.amp,
            self.world,
            self.bad_val,
            self.stop,
            memory_format=self.memory_format,
            watch=watch,
        )

    def _check_folder(self) -> None:
        """Save and stop where the run folder is no longer under its name. All ranks must call it."""
        if self.world.on_main(self.folder.is_gone):
            self._save()

    def _save(self) -> None:
        """A checkpoint of the position. All ranks must call it."""
        self.bad.share()
        state = collect(self.run)
        # rank 0 has what all have
        self.world.on_main(lambda: self.folder.save(self.position, self.results, state, self._counts()))

    def _counts(self) -> dict[str, Any]:
        """What a checkpoint says of its position."""
        return {
            "progress": {
                "train_images": self.run.train_images,
                "train_seconds": self.run.train_seconds,
                "seconds": self.run.elapsed(),
            },
            "guard": self.guard.state(),
            "bad_images": self.bad.state(),
            "updates": self.run.updates,
        }

    def _origin(self) -> dict[str, Any]:
        return origin(self.folder.facts["command"], self.folder.facts["pretrained"])

    def _preempted(self) -> None:
        self._event("preempted", signal=self.stop.signal, epoch=self.position.epoch, slot=self.position.update)
        raise Preempted(
            f"stopped by {self.stop.signal or 'a signal to another process'} after {self.position}; saved in "
            f"{self.folder.checkpoint(self.position)}: continue with --resume auto"
        )

    def _event(self, what: str, **values: float | str) -> None:
        self.log.record("event", self.run.updates, {"what": what, **values})
