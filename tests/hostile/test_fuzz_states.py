"""Mutations of what trainings go on from, ours and mmengine's: in the bytes of the pickle, with right checksums around
it, and in the values. Either is refused by UserError or gives a state that holds what was promised."""

import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ssm_train.common.distributed import World
from ssm_train.common.errors import UserError
from ssm_train.config.load import load_config
from ssm_train.record.checkpoint import Checkpoint
from ssm_train.start import prepare
from ssm_train.step.state import collect, restore_progress

from ..models.test_hostile_files import mutate, repacked
from ..run_meta import META
from .amount import amounts

# in the place of any part of a state
ODD = (None, True, -1, 1 << 70, 1.5, float("nan"), "text", "", [], [[1]], {}, {3: 4}, {"a": {}}, torch.zeros(2))


def packed(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damaged(content: Any, draw: random.Random) -> bytes:
    """A file with one change: of a value, which it replaces, removes or doubles, or of the pickle's bytes."""
    if draw.random() < 0.5:
        return repacked(packed(content), draw) if draw.random() < 0.8 else mutate(packed(content), draw)
    return packed(_changed(content, draw))


def _changed(value: Any, draw: random.Random) -> Any:
    if isinstance(value, torch.Tensor):
        return draw.choice([*ODD, value.double(), value.int(), value.flatten()[:1], value * float("nan")])
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    place = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copied = value.copy()
    kind = draw.random()
    if kind < 0.1:
        del copied[place]
    elif kind < 0.2 and isinstance(value, dict):
        copied[draw.choice(["x", 3, ""])] = value[place]
    else:
        copied[place] = _changed(value[place], draw)
    return copied


def refusals(read: Callable[[bytes], None], content: Any, files: int) -> int:
    """How many of `files` are refused; all others are read."""
    read(packed(content))
    draw, refused = random.Random(files), 0
    for _ in range(files):
        try:
            read(damaged(content, draw))
        except UserError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000
    return refused


@pytest.mark.parametrize("files", amounts(100, 2000))
def test_train_state(files, tiny_cfg, tmp_path):
    cfg = load_config(str(tiny_cfg), ["AMP", "off"])
    training = prepare(cfg, World(0, 1, torch.device("cpu")), updates_per_epoch=5)
    for parameter in training.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()
    state = collect(training)
    weights = {name: value.clone() for name, value in training.network.state_dict().items()}
    del state["model"], state["ema"]
    state["updates"] = 1

    def read(data: bytes) -> None:
        (tmp_path / "train_state.pt").write_bytes(data)
        restore_progress(training, Checkpoint(tmp_path, META, ("train_state.pt",)), META["images_per_update"])
        for parameter in training.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        training.optimizer.step()
        assert all(value.isfinite().all() for value in training.network.state_dict().values())
        training.network.load_state_dict(weights)

    assert refusals(read, state, files) > files // 2


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 3), nn.Linear(3, 1)


@pytest.mark.dense
@pytest.mark.parametrize("files", amounts(100, 2000))
def test_checkpoint_of_mmengine(files, tmp_path):
    pytest.importorskip("mmengine")
    import numpy as np
    from mmengine.logging import HistoryBuffer
    from mmengine.optim import LinearLR, OptimWrapper

    from ssm_mm.checkpoints import Options, load_strictly, read_to_resume
    from ssm_mm.resuming import resume_fault

    model, path = Detector(), tmp_path / "iter_3.pth"

    def begun() -> tuple[OptimWrapper, list[LinearLR]]:
        """An optimizer and its scheduler after a step."""
        wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
        schedulers = [LinearLR(wrapper, start_factor=0.1)]
        step(wrapper, schedulers)
        return wrapper, schedulers

    def step(wrapper: OptimWrapper, schedulers: list[LinearLR]) -> None:
        wrapper.update_params(model.head(model.backbone(torch.ones(1, 2))).square().mean())
        schedulers[0].step()

    wrapper, schedulers = begun()
    hub = {
        "log_scalars": {"train/loss": HistoryBuffer(np.ones(3), np.ones(3), 10)},
        "runtime_info": {"iter": 3, "lr": np.float64(1e-3), "shape": np.arange(4)},
        "resumed_keys": {"train/loss": True},
    }
    meta = {"epoch": 1, "iter": 3, "cfg": "x = 1", "seed": 0, "dataset_meta": {"classes": ("a", "b")}}
    averaged = {"steps": torch.tensor(3), **{f"module.{name}": value for name, value in model.state_dict().items()}}
    content = {
        "meta": meta,
        "state_dict": model.state_dict(),
        "ema_state_dict": averaged,
        "optimizer": wrapper.state_dict(),
        "param_schedulers": [schedulers[0].state_dict()],
        "message_hub": hub,
    }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        content = read_to_resume(path)
        assert "cfg" not in content["meta"]
        for which in ("ema", "model"):
            load_strictly(model, path, Options(which))
        assert all(value.isfinite().all() for value in model.state_dict().values())
        wrapper, schedulers = begun()
        if resume_fault(content, wrapper, schedulers) == "":
            if "optimizer" in content:
                wrapper.load_state_dict(content["optimizer"])
            if "param_schedulers" in content:
                [state] = content["param_schedulers"]
                schedulers[0].load_state_dict(state)
            step(wrapper, schedulers)  # to whatever numbers: it must not crash

    assert refusals(read, content, files) > files // 4
