"""ssm_mm.resuming: states of optimizers and schedulers, valid ones through a file, and others."""

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper, OptimWrapperDict, PolyLR  # noqa: E402

from ssm_mm.checkpoints import read  # noqa: E402
from ssm_mm.resuming import own_records, resume_fault  # noqa: E402


def training(kind=torch.optim.AdamW, steps=3, **settings):
    """(wrapper, schedulers) after some steps."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    wrapper = OptimWrapper(kind(groups, lr=0.1, **settings))
    schedulers = [
        LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=2),
        MultiStepLR(wrapper, milestones=[3, 5], by_epoch=False),
        PolyLR(wrapper, power=1.0, begin=0, end=9, by_epoch=False),
    ]
    for _ in range(steps):
        wrapper.update_params(model(torch.ones(1, 3)).square().mean())
        for scheduler in schedulers:
            scheduler.step()
    return wrapper, schedulers


def content_of(wrapper, schedulers):
    return {"optimizer": wrapper.state_dict(), "param_schedulers": [each.state_dict() for each in schedulers]}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.RMSprop, {}),
    ],
)
def test_what_a_training_wrote(kind, settings, tmp_path):
    torch.save(content_of(*training(kind, **settings)), tmp_path / "a.pth")
    content = read(tmp_path / "a.pth")
    assert resume_fault(content, *training(kind, steps=0, **settings)) == ""
    assert resume_fault({}, *training(kind, steps=0)) == ""
    assert resume_fault(content, training(kind, steps=0, **settings)[0], None) == ""


STATES = {
    "another shape": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)),
    "a number for all": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1)),
    "integers": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(2, 3).int()),
    "nan": lambda c: c["optimizer"]["state"][1]["exp_avg_sq"].fill_(math.nan),
    "text": lambda c: c["optimizer"]["state"][1].update(step="3"),
    "less": lambda c: c["optimizer"]["state"][0].pop("exp_avg"),
    "no mapping": lambda c: c["optimizer"]["state"].update({1: 5}),
    "a parameter more": lambda c: c["optimizer"]["state"].update({2: {}}),
    "a group less": lambda c: c["optimizer"]["param_groups"].pop(),
    "other parameters": lambda c: c["optimizer"]["param_groups"][1].update(params=[1, 2]),
    "a rate that is none": lambda c: c["optimizer"]["param_groups"][1].update(lr="high"),
    "an infinite rate": lambda c: c["optimizer"]["param_groups"][1].update(lr=math.inf),
    "no groups": lambda c: c["optimizer"].pop("param_groups"),
    "no state": lambda c: c.update(optimizer={}),
    "no optimizer": lambda c: c.update(optimizer=[1]),
    "a moment that is none": lambda c: c["optimizer"]["state"][1].update(exp_avg=None),
    "another attribute": lambda c: c["param_schedulers"][0].update(param_name="momentum"),
    "a scheduler less": lambda c: c["param_schedulers"].pop(),
    "schedulers by name": lambda c: c.update(param_schedulers={"a": c["param_schedulers"]}),
    "an attribute more": lambda c: c["param_schedulers"][0].update(step=3),
    "an attribute less": lambda c: c["param_schedulers"][0].pop("last_step"),
    "an attribute of another kind": lambda c: c["param_schedulers"][2].update(power="1"),
}


@pytest.mark.parametrize("kind", STATES)
def test_other_states(kind):
    content = copy.deepcopy(content_of(*training()))
    STATES[kind](content)
    fault = resume_fault(content, *training(steps=0))
    whose = "schedulers are not" if "schedul" in kind or "attribute" in kind else "optimizer has"
    assert fault.startswith(f"its {whose}")


def test_several_optimizers():
    (first, of_first), (second, of_second) = training(), training()
    wrapper, schedulers = OptimWrapperDict(a=first, b=second), {"a": of_first, "b": of_second}
    content = {
        "optimizer": wrapper.state_dict(),
        "param_schedulers": {name: [each.state_dict() for each in schedulers[name]] for name in schedulers},
    }
    assert resume_fault(content, wrapper, schedulers) == ""
    broken = copy.deepcopy(content)
    broken["optimizer"]["b"]["state"][0]["exp_avg"] = torch.zeros(1)
    assert resume_fault(broken, wrapper, schedulers).startswith("its optimizer has for parameter 0 a 'exp_avg'")
    assert resume_fault({**content, "optimizer": 3}, wrapper, schedulers) == "its optimizer has no state"


def test_records_of_this_training_alone(tmp_path):
    """Scores, numbers of checkpoints, and paths into the own folder; what tells mmengine to delete elsewhere goes."""
    curve = HistoryBuffer([1.0], [1], 10)
    own = str(tmp_path / "best_mIoU_iter_2.pth")
    kept = {"best_score": 0.5, "best_score_mIoU": 1, "best_ckpt": own, "keep_ckpt_ids": [2, 4]}
    foreign = {
        **{"best_ckpt_a": str(tmp_path.parent / "best_a.pth"), "best_ckpt_b": str(tmp_path), "best_ckpt_c": 3},
        **{"best_ckpt_d": f"{tmp_path}/run/../../best_d.pth", "best_ckpt_e": f"{tmp_path}/iter_2.pth"},
        **{"best_score_a": "high", "best_score_b": math.nan, "cfg": "x = 1", "loop_stage": "train", 3: 4},
    }
    content = {
        "meta": {"epoch": 1, "iter": 2, "seed": 1 << 40},
        "message_hub": {
            "log_scalars": {"train/loss": curve, "train/x": [1.0]},
            "runtime_info": {**kept, **foreign},
            "resumed_keys": {"train/loss": True, "best_score": torch.ones(2), "best_ckpt": False, "x": True},
        },
    }
    own_records(content, tmp_path)
    assert content["message_hub"] == {
        "log_scalars": {"train/loss": curve},
        "runtime_info": kept,
        "resumed_keys": {"train/loss": True, "best_ckpt": False},
    }
    assert content["meta"] == {"epoch": 1, "iter": 2}
    for ids in ([-1], ["/../../x"], [1 << 70], "12", [True]):
        content["message_hub"]["runtime_info"] = {"keep_ckpt_ids": ids}
        own_records(content, tmp_path)
        assert content["message_hub"]["runtime_info"] == {}, ids


def test_numbers_beyond_floats():
    """Which math.isfinite cannot answer for."""
    content = copy.deepcopy(content_of(*training()))
    content["optimizer"]["param_groups"][1]["lr"] = 1 << 2000
    assert resume_fault(content, *training(steps=0)).startswith("its optimizer has other groups")
