"""Checkpoints of mmengine are data: curves and numbers are read by our own hand, code in them is never run, in no
command of either task."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.config import Config  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from PIL import Image  # noqa: E402

from ssm_mm.checkpoints import read, read_to_resume  # noqa: E402
from ssm_mm.config import read_config  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_numbers_and_curves_are_read(tmp_path):
    log = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1], max_length=7)
    values = {
        "number": np.float32(0.5),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 3), np.uint8),
        "flag": np.array([True, False]),
    }
    before = torch.serialization.get_safe_globals()
    torch.save({"message_hub": {"loss": log}, "state_dict": {}, "values": values}, tmp_path / "epoch_1.pth")
    content = read(tmp_path / "epoch_1.pth")
    found = content["message_hub"]["loss"]
    assert found.mean() == 3.0 and found.statistics("max") == 6.0 and found.max_length == 7
    found.update(9.0)
    assert found.current() == 9.0
    assert type(content["values"].pop("number")) is float
    for name, value in content["values"].items():
        assert value.dtype == values[name].dtype and np.array_equal(value, values[name])
        assert value.flags.writeable and value.flags.f_contiguous == values[name].flags.f_contiguous
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda path: Call(os.mkdir, str(path)), "mkdir"),
        (lambda path: Call(getattr, HistoryBuffer, "__init__"), "__init__"),
        (lambda path: Call(getattr, HistoryBuffer, "register_statistics"), "register_statistics"),
        (lambda path: np.array([{}, []], dtype=object), "array of O8"),
        (lambda path: np.array(["text"]), "array of U4"),
        (lambda path: np.zeros(2, dtype=[("x", "f8")]), "array of V8"),
    ],
)
def test_other_code_is_refused_and_not_run(call, named, tmp_path):
    torch.save({"state_dict": {}, "extra": call(tmp_path / "made")}, tmp_path / "epoch_1.pth")
    with pytest.raises(UserError, match=named):
        read(tmp_path / "epoch_1.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("changed", [b"i4", b"f2", b"O8", b"V8", b"c8"])
def test_arrays_of_another_kind_than_their_bytes(changed, tmp_path):
    torch.save(
        {"extra": np.arange(3, dtype="f8")}, path := tmp_path / "epoch_1.pth", _use_new_zipfile_serialization=False
    )
    content = path.read_bytes()
    assert content.count(b"f8") == 1
    path.write_bytes(content.replace(b"f8", changed))
    with pytest.raises(UserError, match="holds an array of"):
        read(path)


# ---- the commands ----

# the checkpoint below is of the last step, so that there is nothing left to train
TASKS = {
    "detection": ("mask-rcnn_vmamba-nano_fpn_digits.py", "train_cfg.max_epochs=1"),
    "segmentation": ("upernet_vmamba-nano_digits.py", "train_cfg.max_iters=2"),
}
SHORT = ["train_cfg.val_interval=9", "log_level=ERROR"]
SHORT += [f"{split}_dataloader.{key}" for split in ("train", "val", "test")
          for key in ("num_workers=0", "persistent_workers=False")]  # fmt: skip


@pytest.fixture(scope="module", params=TASKS)
def task(request, tmp_path_factory):
    """(tools by name, config, common flags, weights of the model, a folder) of a task"""
    name = request.param
    pytest.importorskip("mmdet" if name == "detection" else "mmseg")
    digit_scenes, *tools = (
        __import__(f"{name}.{module}", fromlist=["main"])
        for module in ("data.digit_scenes", "tools.train", "tools.test", "tools.image_demo")
    )
    folder = tmp_path_factory.mktemp(name)
    assert digit_scenes.main(["--out", str(folder / "data"), "--train", "2", "--val", "1"]) == 0
    config = ROOT / "configs" / name / "digits" / TASKS[name][0]
    weights = MODELS.build(read_config(str(config)).model).state_dict()
    common = ["--data-root", str(folder / "data"), "--cfg-options", *SHORT, TASKS[name][1]]
    return dict(zip(("train", "test", "demo"), tools, strict=True)), config, common, weights, folder


def test_no_command_executes_the_config_in_a_checkpoint(task, capfd):
    tools, config, common, weights, folder = task
    code = f"open({str(folder / 'executed')!r}, 'w').close()\nx = 1\n"
    meta = {
        "epoch": 1,
        "iter": 2,
        "cfg": code,
        "config": code,
        "dataset_meta": {"classes": ("0",), "palette": [(0, 0, 0)]},
    }
    hub = {"log_scalars": {}, "runtime_info": {"cfg": code, "config": code}, "resumed_keys": {}}
    content = {"meta": meta, "state_dict": weights, "message_hub": hub}
    path = folder / "epoch_1.pth"
    torch.save(content, path)
    assert set(read_to_resume(path)["meta"]) == {"epoch", "iter", "dataset_meta"}
    assert read_to_resume(path)["message_hub"]["runtime_info"] == {}
    image = next((folder / "data").rglob("*1.png"))
    Image.open(image).convert("RGB").save(folder / "image.png")
    demo = ["--config", str(config), "--checkpoint", str(path), "--device", "cpu", "--out-dir", str(folder / "out")]
    for tool, arguments in (
        ("train", [str(config), "--resume", str(path), "--work-dir", str(folder / "work"), *common]),
        ("train", [str(config), "--resume", "--work-dir", str(folder), *common]),
        ("train", [str(config), "--work-dir", str(folder / "from"), *common, f"load_from={path}"]),
        ("test", [str(config), str(path), "--work-dir", str(folder / "work"), *common]),
        ("demo", [str(folder / "image.png"), *demo]),
    ):
        assert tools[tool].main(arguments) == 0, capfd.readouterr().err
        assert not (folder / "executed").exists(), tool
    # what mmengine does with it
    Config.fromstring(code, ".py")
    assert (folder / "executed").exists()


def test_what_is_no_training_is_not_resumed(task, capfd):
    tools, config, common, weights, folder = task
    path = folder / "weights.pth"
    meta, hub = {"epoch": 1, "iter": 2}, {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
    for content in (
        {"state_dict": weights},
        {"state_dict": weights, "meta": meta},
        {"state_dict": weights, "meta": {**meta, "iter": -1}, "message_hub": hub},
        {"state_dict": weights, "meta": {**meta, "epoch": "1"}, "message_hub": hub},
        {"state_dict": weights, "meta": meta, "message_hub": {"log_scalars": {}}},
    ):
        torch.save(content, path)
        capfd.readouterr()
        assert (
            tools["train"].main([str(config), "--resume", str(path), "--work-dir", str(folder / "work"), *common]) == 2
        )
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"error: checkpoint {path} holds no state of a training: ")
