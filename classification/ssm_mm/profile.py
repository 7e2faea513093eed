"""Where the time of a training step goes: data, backbone, neck and heads, optimizer."""

import json
import statistics
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

_WARM_UP = 2  # steps that allocate memory and compile kernels


def prepare_profile(cfg: Config, steps: int) -> None:
    """Make `cfg` train `steps` and the warm-up, and neither validate nor save."""
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps + _WARM_UP, "val_interval": 10**9}
    cfg.param_scheduler = None
    for name in ("val_cfg", "val_dataloader", "val_evaluator", "test_cfg", "test_dataloader", "test_evaluator"):
        cfg[name] = None
    cfg.default_hooks.checkpoint = None
    cfg.log_processor.by_epoch = False


class StepProfile(Hook):
    """Marks the time at the borders of the parts of every step; prints their medians after the last.

    The backward pass reaches the backbone when the gradients of all its maps are known, and leaves it when the
    optimizer begins.
    """

    priority = "VERY_LOW"

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.records: list[dict[str, float]] = []
        self._marks: dict[str, float] = {}

    def before_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.register_forward_pre_hook(lambda *_: self._mark("forward"))
        model.register_forward_hook(lambda *_: self._mark("loss"))
        model.backbone.register_forward_pre_hook(lambda *_: self._mark("backbone"))
        model.backbone.register_forward_hook(self._leave_backbone)
        optimizer = runner.optim_wrapper.optimizer
        optimizer.register_step_pre_hook(lambda *_: self._mark("gradients"))
        optimizer.register_step_post_hook(lambda *_: self._mark("step"))
        self._mark("end")

    def _leave_backbone(self, module: nn.Module, inputs: tuple, maps: tuple[Tensor, ...]) -> None:
        self._mark("maps")
        for x in maps:
            if x.requires_grad:
                x.register_hook(lambda grad: self._mark("map gradients"))

    def _mark(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._marks[name] = time.perf_counter()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        before = self._marks["end"]
        self._marks = {}
        self._mark("begin")
        self._marks["end"] = before

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        marks = self._marks
        # no gradient reaches a frozen backbone
        border = marks.get("map gradients", marks["gradients"])
        backbone = marks["maps"] - marks["backbone"]
        self.records.append(
            {
                "data": marks["begin"] - marks["end"],
                "backbone forward": backbone,
                "neck and heads forward": marks["loss"] - marks["forward"] - backbone,
                "neck and heads backward": border - marks["loss"],
                "backbone backward": marks["gradients"] - border,
                "optimizer": marks["step"] - marks["gradients"],
            }
        )
        self._mark("end")

    def after_train(self, runner: Runner) -> None:
        report = summarise(self.records[-self.steps :])
        path = Path(runner.work_dir) / "profile.json"
        path.write_text(json.dumps(report, indent=1))
        lines = [f"{name:<24} {1000 * seconds:9.1f} ms" for name, seconds in report["seconds"].items()]
        lines.append(f"the backbone takes {100 * report['backbone_share']:.1f} % of a step without data")
        print("\n".join([f"medians of {self.steps} steps", *lines, str(path)]))


def summarise(records: list[dict[str, float]]) -> dict:
    """Median seconds of every part, and the share of the backbone, forward and backward, in a step without data."""
    seconds = {name: statistics.median(record[name] for record in records) for name in records[0]}
    backbone = seconds["backbone forward"] + seconds["backbone backward"]
    return {"seconds": seconds, "backbone_share": backbone / (sum(seconds.values()) - seconds["data"])}
