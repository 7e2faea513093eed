"""Parsers of training logs, each on a few literal lines, and the curves drawn from them."""

import csv
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from timm.utils import update_summary

from analyze.impl import loss
from analyze.logs import read_log
from analyze.loss import main
from ssm_train.common.errors import UserError
from ssm_train.record.curves import Series
from ssm_train.record.series import Summary

DATA = Path(__file__).parents[1] / "data/logs"

SWIN = """\
[2024-03-02 10:00:00 vssm_tiny] (main.py 110): INFO Creating model:vssm/vssm_tiny
[2024-03-02 10:00:01 vssm_tiny] (main.py 210): INFO Start training
[2024-03-02 10:00:02 vssm_tiny] (main.py 280): INFO Train: [0/300][0/20]\teta 3:42:44 lr 0.000001\t wd 0.0500\ttime \
10.6829 (10.6829)\tloss 6.9587 (6.9587)\tgrad_norm 1.8003 (inf)\tloss_scale 65536.0000 (65536.0000)\tmem 7939MB
[2024-03-02 10:01:02 vssm_tiny] (main.py 280): INFO Train: [0/300][10/20]\teta 3:42:44 lr 0.000011\t wd 0.0500\ttime \
0.4000 (0.5000)\tloss 6.9000 (6.9500)\tgrad_norm 1.2000 (1.3000)\tloss_scale 65536.0000 (65536.0000)\tmem 12345MB
[2024-03-02 10:02:02 vssm_tiny] (main.py 290): INFO EPOCH 0 training takes 0:10:29
[2024-03-02 10:02:12 vssm_tiny] (main.py 330): INFO Test: [0/98]\tTime 2.3 (2.3)\tLoss 6.9 (6.9)\tAcc@1 0.1 (0.1)\t\
Acc@5 0.5 (0.5)\tMem 7939MB
[2024-03-02 10:02:22 vssm_tiny] (main.py 340): INFO  * Acc@1 76.123 Acc@5 93.0
[2024-03-02 10:02:22 vssm_tiny] (main.py 220): INFO Accuracy of the network on the 50000 test images: 76.1%
[2024-03-02 10:02:22 vssm_tiny] (main.py 222): INFO Max accuracy: 76.12%
[2024-03-02 10:02:32 vssm_tiny] (main.py 340): INFO  * Acc@1 10.5 Acc@5 20.25
[2024-03-02 10:02:32 vssm_tiny] (main.py 226): INFO Accuracy of the network on the 50000 test images: 10.5%
[2024-03-02 10:02:32 vssm_tiny] (main.py 228): INFO Max accuracy ema: 10.50%
[2024-03-02 10:03:02 vssm_tiny] (main.py 280): INFO Train: [1/300][19/20]\teta 3:42:44 lr 0.000021\t wd 0.0500\ttime \
0.4000 (0.5000)\tloss nan (5.5000)\tgrad_norm 2.0000 (1.3000)\tloss_scale 65536.0000 (65536.0000)\tmem 12345MB
"""

MORE = """\
[2024-03-02 11:00:00 vssm_tiny] (main.py 110): INFO Creating model:vssm/vssm_tiny
[2024-03-02 11:00:22 vssm_tiny] (main.py 340): INFO  * Acc@1 1.0 Acc@5 2.0
[2024-03-02 11:00:22 vssm_tiny] (main.py 220): INFO Accuracy of the network on the 50000 test images: 1.0%
[2024-03-02 11:00:32 vssm_tiny] (main.py 340): INFO  * Acc@1 3.0 Acc@5 4.0
[2024-03-02 11:00:32 vssm_tiny] (main.py 226): INFO Accuracy of the network ema on the 50000 test images: 3.0%
"""

DEIT = """\
{"train_lr": 1e-06, "train_loss": 6.9, "train_grad_norm": Infinity, "test_loss": 6.5, "test_acc1": 1.5, \
"test_acc5": 5.5, "epoch": 0, "n_parameters": 28589128}
{"train_lr": 2e-06, "train_loss": 6.1, "train_grad_norm": 2.5, "test_loss": 5.5, "test_acc1": 4.5, "test_acc5": 12.5, \
"epoch": 1, "n_parameters": 28589128, "test_acc1_ema": 0.25}
{"train_lr": 3e-06, "tra"""

SCALARS = """\
{"base_lr": 0.0001, "lr": 0.0001, "data_time": 0.01, "grad_norm": 3.5, "loss": 1.5, "loss_cls": 0.5, "time": 0.4, \
"epoch": 1, "iter": 5, "memory": 8000, "step": 5}
{"coco/bbox_mAP": 0.125, "coco/segm_mAP": 0.1, "data_time": 0.01, "time": 0.1, "step": 1}
{"lr": 0.0002, "data_time": 0.01, "loss": 1.25, "time": 0.4, "epoch": 2, "iter": 15, "memory": 8000, "step": 15}
{"lr": 0.0002, "data_time": 0.01, "loss": 1.0, "time": 0.4, "epoch": 2, "iter": 20, "memory": 8000, "step": 20}
{"coco/bbox_mAP": 0.412, "coco/segm_mAP": 0.375, "data_time": 0.01, "time": 0.1, "step": 2}
"""

ITERATIONS = """\
{"lr": 6e-05, "data_time": 0.01, "loss": 2.5, "decode.acc_seg": 50.5, "time": 0.4, "iter": 50, "memory": 1, "step": 50}
{"aAcc": 80.0, "mIoU": 47.3, "mAcc": 58.5, "data_time": 0.01, "time": 0.1, "step": 16000}
"""

MM_EPOCHS = """\
2023/01/01 12:00:00 - mmengine - INFO - Hooks will be executed in the following order:
2023/01/01 12:00:00 - mmengine - INFO - Epoch(train)  [1][  50/7330]  base_lr: 1.0000e-04 lr: 9.8000e-05  eta: 1 day, \
2:00:00  time: 0.5000  data_time: 0.0100  memory: 9999  grad_norm: 3.2000  loss: 1.2000  loss_rpn_cls: 0.5000
2023/01/01 12:10:00 - mmengine - INFO - Epoch(train)  [1][7330/7330]  lr: 1.0000e-04  eta: 16:31:08  time: 0.5000  \
data_time: 0.0100  memory: 9999  loss: nan  loss_rpn_cls: 0.2500
2023/01/01 12:10:01 - mmengine - INFO - Epoch(val)  [1][  50/5000]    eta: 0:10:00  time: 0.0500  data_time: 0.0030  \
memory: 7000
2023/01/01 12:20:00 - mmengine - INFO - bbox_mAP_copypaste: 0.412 0.6 0.4 0.2 0.4 0.5
2023/01/01 12:20:00 - mmengine - INFO - Epoch(val) [1][5000/5000]    coco/bbox_mAP: 0.4120  coco/bbox_mAP_50: 0.6000  \
data_time: 0.0020  time: 0.0300
"""

MM_ITERATIONS = """\
2023/01/01 12:00:00 - mmengine - INFO - Iter(train) [    50/160000]  lr: 6.0000e-05  loss: 2.1633  decode.acc_seg: 41.5
2023/01/01 12:00:00 - mmengine - INFO - Iter(train) [ 16000/160000]  lr: 5.0000e-05  loss: 0.5000  decode.acc_seg: 90.5
2023/01/01 12:00:00 - mmengine - INFO - Iter(val) [2000/2000]    aAcc: 82.4500  mIoU: 47.3000  mAcc: 58.0000
"""

MMCV = """\
2022-11-12 18:59:00,0 - mmdet - INFO - Epoch [1][481/962]\tlr: 2.000e-02, eta: 2:36:19, time: 0.969, data_time: 0.06, \
memory: 5062, loss_rpn_cls: 0.0290, loss: 1.5000
2022-11-12 18:59:54,118 - mmdet - INFO - Epoch(val) [1][200]\tbbox_mAP: 0.0210, bbox_mAP_s: -1.0000, \
bbox_mAP_copypaste: 0.021 0.094
"""


def write(folder, text, name="some.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_swin(tmp_path):
    log = read_log(write(tmp_path / "tiny", SWIN, "log_rank0.txt"))
    assert (log.name, log.unit) == ("tiny", "epoch")
    assert log.series["train/lr"] == ([0.05, 0.55, 2.0], [1e-6, 1.1e-5, 2.1e-5])
    loss_curve = log.series["train/loss"]
    assert loss_curve.x == [0.05, 0.55, 2.0] and loss_curve.y[:2] == [6.9587, 6.9] and math.isnan(loss_curve.y[2])
    assert log.series["epoch/train_loss"] == ([0.5, 1.5], [6.95, 5.5])
    assert log.series["train/grad_norm"].y == [1.8003, 1.2, 2.0]
    assert log.series["train/memory_mb"].y == [7939, 12345, 12345]
    assert log.series["val/top1"] == ([1], [76.123]) and log.series["val/top5"] == ([1], [93.0])
    assert log.series["val/ema_top1"] == ([1], [10.5]) and log.series["val/ema_top5"] == ([1], [20.25])
    assert len(log.series) == 9


def test_swin_resumed_run(tmp_path):
    """A checkpoint that is validated before its training goes on enters where its epoch has no result."""
    again = SWIN.splitlines(keepends=True)[2].replace("6.9587 (6.9587)", "4.0 (4.5)")
    log = read_log(write(tmp_path, SWIN + MORE + again))
    assert log.series["val/top1"] == ([1, 2], [76.123, 1.0])
    assert log.series["val/ema_top1"] == ([1, 2], [10.5, 3.0])
    assert log.series["train/loss"].y[:2] == [4.0, 6.9] and log.series["epoch/train_loss"].y == [4.5, 5.5]
    known = read_log(write(tmp_path, SWIN.rpartition("[2024")[0] + MORE)).series
    assert known["val/top1"] == ([1], [76.123]) and known["val/ema_top1"] == ([1], [10.5])


def test_swin_with_rounded_results_alone(tmp_path):
    text = "\n".join(line for line in SWIN.splitlines() if "* Acc@1" not in line)
    log = read_log(write(tmp_path, text))
    assert log.series["val/top1"] == ([1], [76.1]) and log.series["val/ema_top1"] == ([1], [10.5])
    assert "val/top5" not in log.series


def test_deit(tmp_path):
    log = read_log(write(tmp_path / "convnext", DEIT, "log.txt"))
    assert (log.name, log.unit) == ("convnext", "epoch")
    assert log.series["epoch/train_loss"] == ([0.5, 1.5], [6.9, 6.1])
    assert log.series["train/lr"] == ([1, 2], [1e-6, 2e-6])
    assert math.isnan(log.series["train/grad_norm"].y[0]) and log.series["train/grad_norm"].y[1] == 2.5
    assert log.series["val/loss"] == ([1, 2], [6.5, 5.5])
    assert log.series["val/top1"] == ([1, 2], [1.5, 4.5]) and log.series["val/top5"] == ([1, 2], [5.5, 12.5])
    assert log.series["val/ema_top1"] == ([2], [0.25])


def test_mmengine_scalars_of_epochs(tmp_path):
    log = read_log(write(tmp_path / "20230101_120000" / "vis_data", SCALARS, "scalars.json"))
    assert (log.name, log.unit) == ("20230101_120000", "epoch")
    assert log.series["train/loss"] == ([0.5, 1.5, 2.0], [1.5, 1.25, 1.0])  # 10 iterations an epoch
    assert log.series["train/loss_cls"] == ([0.5], [0.5]) and log.series["train/grad_norm"] == ([0.5], [3.5])
    assert log.series["train/memory"].y == [8000] * 3
    assert log.series["val/coco/bbox_mAP"] == ([1, 2], [0.125, 0.412])
    assert log.series["val/coco/segm_mAP"] == ([1, 2], [0.1, 0.375])
    assert not {"train/epoch", "train/time", "val/time", "val/step"} & set(log.series)


def test_mmengine_scalars_of_iterations(tmp_path):
    log = read_log(write(tmp_path, ITERATIONS))
    assert log.unit == "iteration"
    assert log.series["train/loss"] == ([50], [2.5]) and log.series["train/decode.acc_seg"] == ([50], [50.5])
    assert log.series["val/mIoU"] == ([16000], [47.3]) and log.series["val/mAcc"] == ([16000], [58.5])


def test_mmengine_text_of_epochs(tmp_path):
    log = read_log(write(tmp_path, MM_EPOCHS, "20230101_120000.log"))
    assert (log.name, log.unit) == ("20230101_120000", "epoch")
    x = [50 / 7330, 1.0]
    assert log.series["train/loss"].x == x and log.series["train/loss"].y[0] == 1.2
    assert math.isnan(log.series["train/loss"].y[1])
    assert log.series["train/lr"] == (x, [9.8e-5, 1e-4]) and log.series["train/loss_rpn_cls"] == (x, [0.5, 0.25])
    assert log.series["val/coco/bbox_mAP"] == ([1], [0.412]) and log.series["val/coco/bbox_mAP_50"] == ([1], [0.6])
    assert {key for key in log.series if key.startswith("val")} == {"val/coco/bbox_mAP", "val/coco/bbox_mAP_50"}
    assert not {"train/eta", "train/time", "train/data_time"} & set(log.series)


def test_mmengine_text_of_iterations(tmp_path):
    log = read_log(write(tmp_path, MM_ITERATIONS))
    assert log.unit == "iteration"
    assert log.series["train/loss"] == ([50, 16000], [2.1633, 0.5])
    assert log.series["val/mIoU"] == ([16000], [47.3]) and log.series["val/aAcc"] == ([16000], [82.45])


def test_mmcv_text(tmp_path):
    log = read_log(write(tmp_path, MMCV))
    assert log.series["train/loss"] == ([0.5], [1.5]) and log.series["train/lr"] == ([0.5], [0.02])
    assert log.series["val/bbox_mAP"] == ([1], [0.021]) and log.series["val/bbox_mAP_s"] == ([1], [-1.0])


OURS = [
    {"kind": "train", "update": 1, "epoch": 1, "iteration": 1, "loss": 2.5, "lr": 0.1, "grad_norm": None,
     "images_per_second": 10.0, "data_wait": 0.5},
    {"kind": "train", "update": 2, "epoch": 1, "iteration": 2, "loss": 1.5, "lr": 0.2, "grad_norm": 3.0,
     "images_per_second": 10.0, "data_wait": 0.5},
    {"kind": "val", "update": 2, "epoch": 1, "top1": 50.0, "top5": 75.0, "loss": 1.25, "images": 4, "excluded": 0,
     "seconds": 1.0},
]  # fmt: skip


def ours(folder):
    return write(folder, "".join(json.dumps(entry) + "\n" for entry in OURS), "log.jsonl")


def test_ours(tmp_path):
    log = read_log(ours(tmp_path / "run"))
    assert (log.name, log.unit) == ("run", "epoch")
    assert log.series["train/loss"] == Series([0.5, 1.0], [2.5, 1.5])
    assert log.series["epoch/train_loss"] == ([0.5], [2.0]) and log.series["val/top1"] == ([1], [50.0])


def test_our_summary(tmp_path):
    entries = [{**OURS[0], "loss": 3.0}, {**OURS[1], "loss": 2.0}, OURS[2] | {"ema_top1": 40.0}]
    log = read_log(write(tmp_path / "run", Summary(entries).csv(), "summary.csv"))
    assert (log.name, log.unit) == ("run", "epoch")
    assert log.series["epoch/train_loss"] == ([0.5], [2.5]) and log.series["train/lr"] == ([1], [0.2])
    assert log.series["val/top1"] == ([1], [50.0]) and log.series["val/ema_top1"] == ([1], [40.0])


def test_vssd(tmp_path):
    """It names the weights of records alone: the plain ones are 30, 50 and 45, the averaged ones 10, 40 and 60."""
    log = read_log(DATA / "vssd.txt")
    assert log.series["val/top1"] == ([1, 2, 3], [30.0, 50.0, 45.0])
    assert log.series["val/top5"] == ([1, 2, 3], [50.0, 70.0, 65.0])
    assert log.series["val/ema_top1"] == ([1, 2, 3], [10.0, 40.0, 60.0])
    assert log.series["train/loss"].y == [7.0, 6.9, 6.0, 5.9, 5.0, 4.9]


def test_vssd_without_any_record_in_an_epoch(tmp_path):
    """The averaged weights come second; without an average, a second result is of a checkpoint that is tried again."""
    text = (DATA / "vssd.txt").read_text()
    unsaid = text.rpartition("\n[")[0] + "\n"  # without the last line, which names the last record
    assert read_log(write(tmp_path, unsaid)).series["val/ema_top1"].y == [10.0, 40.0, 60.0]
    plain = "\n".join(line for line in unsaid.splitlines() if "max accuracy ema" not in line)
    log = read_log(write(tmp_path, plain))
    assert log.series["val/top1"].y == [30.0, 50.0, 45.0] and "val/ema_top1" not in log.series


EVALUATION = """\
[2024-03-02 10:00:00 vssm_tiny] (main.py 97): INFO number of params: 28288354
[2024-03-02 10:02:12 vssm_tiny] (main.py 330): INFO Test: [0/98]\tTime 2.3 (2.3)\tLoss 6.9 (6.9)\tAcc@1 0.1 (0.1)\t\
Acc@5 0.5 (0.5)\tMem 7939MB
[2024-03-02 10:02:22 vssm_tiny] (main.py 340): INFO  * Acc@1 81.25 Acc@5 95.5
[2024-03-02 10:02:22 vssm_tiny] (main.py 220): INFO Accuracy of the network on the 50000 test images: 81.2%
[2024-03-02 10:02:32 vssm_tiny] (main.py 340): INFO  * Acc@1 82.5 Acc@5 96.0
[2024-03-02 10:02:32 vssm_tiny] (main.py 226): INFO Accuracy of the network ema on the 50000 test images: 82.5%
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EVALUATION, {"val/top1": ([1], [81.25]), "val/top5": ([1], [95.5]), "val/ema_top1": ([1], [82.5]),
                      "val/ema_top5": ([1], [96.0])}),
        ("* Acc@1 72.2 Acc@5 91.1 loss 1.25\nAccuracy of the network on the 50000 test images: 72.2%\n",
         {"val/top1": ([1], [72.2]), "val/top5": ([1], [91.1]), "val/loss": ([1], [1.25])}),
        ("Accuracy of the network on the 50000 test images: 81.2%\n"
         "Accuracy of the network on the 50000 test images: 81.4%\n", {"val/top1": ([1, 2], [81.2, 81.4])}),
        ('{"coco/bbox_mAP": 0.1, "data_time": 0.5, "step": 0}\n', {"val/coco/bbox_mAP": ([1], [0.1])}),
        ("x - mmengine - INFO - Epoch(test) [10/20]    eta: 0:00:01  time: 0.1  memory: 7\n"
         "x - mmengine - INFO - Iter(test) [20/20]    aAcc: 82.4500  mIoU: 47.3000  data_time: 0.1  time: 0.1\n",
         {"val/aAcc": ([1], [82.45]), "val/mIoU": ([1], [47.3])}),
    ],
)  # fmt: skip
def test_evaluations_without_training(text, expected, tmp_path):
    log = read_log(write(tmp_path, text))
    assert log.unit == "evaluation" and log.series == expected


def test_scale_up(tmp_path):
    log = read_log(DATA / "vmamba_scaleup.log")
    assert log.unit == "pixel"
    assert log.series == {"val/top1": ([64, 224], [45.341, 82.169]), "val/top5": ([64, 224], [69.076, 96.028])}
    two = (DATA / "vmamba_scaleup.log").read_text() + " * Acc@1 70.0 Acc@5 90.0\n"
    two += "starting loop: img_size 64; len(dataset) 50003\n * Acc@1 46.0 Acc@5 70.0\n"
    with pytest.raises(UserError, match="has several results at 64 pixels"):
        read_log(write(tmp_path, two))


def test_averaged_weights_as_rmt_writes_them():
    log = read_log(DATA / "rmt_t.txt")
    assert log.series["val/ema_top1"] == ([1, 2, 3], [0.1020000015258789, 0.10000000137329101, 0.09800000061035156])
    assert (
        log.series["val/ema_top5"].y[0] == 0.4920000050544739 and log.series["val/ema_loss"].y[2] == 6.908790649736629
    )
    assert log.series["val/top1"].y[2] == 8.120000238990784 and log.series["epoch/train_loss"].x == [0.5, 1.5, 2.5]


def test_timm(tmp_path):
    """As timm itself writes it, with an epoch that was not validated."""
    path = tmp_path / "run" / "summary.csv"
    path.parent.mkdir()
    update_summary(0, {"loss": 6.5}, {"loss": 6.0, "top1": 2.5, "top5": 9.0}, path, lr=0.1)
    update_summary(1, {"loss": 6.25}, None, path, lr=0.2)
    update_summary(2, {"loss": 6.0}, {"loss": 5.0, "top1": 7.5, "top5": 20.0}, path, lr=0.3, write_header=True)
    log = read_log(path)
    assert (log.name, log.unit) == ("run", "epoch")
    assert log.series == {
        "epoch/train_loss": ([0.5, 1.5, 2.5], [6.5, 6.25, 6.0]),
        "train/lr": ([1, 2, 3], [0.1, 0.2, 0.3]),
        "val/loss": ([1, 3], [6.0, 5.0]),
        "val/top1": ([1, 3], [2.5, 7.5]),
        "val/top5": ([1, 3], [9.0, 20.0]),
    }


HISTORY = [
    {"epoch": 0.5, "grad_norm": 3.5, "learning_rate": 5e-05, "loss": 2.5, "step": 10},
    {"epoch": 1.0, "eval_accuracy": 0.625, "eval_f1": 0.5, "eval_loss": 1.5, "eval_runtime": 2.5,
     "eval_samples_per_second": 40.0, "eval_steps_per_second": 5.0, "step": 20},
    {"epoch": 1.5, "grad_norm": float("nan"), "learning_rate": 2e-05, "loss": 1.25, "step": 30},
    {"epoch": 2.0, "step": 40, "total_flos": 7.75e16, "train_loss": 1.9, "train_runtime": 60.0},
]  # fmt: skip


@pytest.mark.parametrize("indent", [2, None])
def test_hugging_face(indent, tmp_path):
    state = {"best_metric": 0.625, "epoch": 2.0, "global_step": 40, "log_history": HISTORY, "max_steps": 40}
    text = json.dumps(state, indent=indent)
    log = read_log(write(tmp_path / "checkpoint-40", text, "trainer_state.json"))
    assert (log.name, log.unit) == ("checkpoint-40", "epoch")
    norm = log.series.pop("train/grad_norm")
    assert norm.x == [0.5, 1.5] and norm.y[0] == 3.5 and math.isnan(norm.y[1])
    assert log.series == {
        "train/loss": ([0.5, 1.5], [2.5, 1.25]),
        "train/lr": ([0.5, 1.5], [5e-05, 2e-05]),
        "val/top1": ([1.0], [62.5]),
        "val/f1": ([1.0], [0.5]),
        "val/loss": ([1.0], [1.5]),
    }
    with pytest.raises(UserError, match="looks like Hugging Face's trainer_state.json, but is no whole JSON"):
        read_log(write(tmp_path, text[:-3], "trainer_state.json"))


LIGHTNING = """\
epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_acc,val_loss
0,0.001,4,,2.5,,
0,,9,,,0.25,2.25
0,,9,2.75,,,
1,0.0005,14,,1.5,,
1,,19,,,0.75,1.25
1,,19,1.75,,,
"""


def test_lightning(tmp_path):
    log = read_log(write(tmp_path / "version_0", LIGHTNING, "metrics.csv"))
    assert (log.name, log.unit) == ("version_0", "epoch")
    assert log.series == {
        "train/lr": ([0.5, 1.5], [0.001, 0.0005]),
        "train/loss": ([0.5, 1.5], [2.5, 1.5]),
        "epoch/train_loss": ([0.5, 1.5], [2.75, 1.75]),
        "val/top1": ([1.0, 2.0], [25.0, 75.0]),
        "val/loss": ([1.0, 2.0], [2.25, 1.25]),
    }


@pytest.mark.parametrize(
    ("header", "curve", "y"),
    [
        ("valid/accuracy", "val/top1", 40.0),  # in percent already
        ("val_top1", "val/top1", 40.0),
        ("val/mIoU", "val/mIoU", 40.0),
        ("train/loss", "train/loss", 40.0),
        ("loss", "train/loss", 40.0),
        ("learning_rate", "train/lr", 40.0),
        ("dice", "dice", 40.0),
    ],
)
def test_columns_of_lightning(header, curve, y, tmp_path):
    log = read_log(write(tmp_path, f"step,epoch,{header}\n9,0,{y}\n", "metrics.csv"))
    assert log.series == {curve: ([1.0], [y])}


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch 1 was good\n", "is of no known form; looked for: "),
        ("\x00\xff", "is of no known form"),
        ("INFO:root:batch_size 128 throughput 684.47\n", '; Swin, VMamba or VSSD: "Train: [0/300][0/1251]"; '),
        ("starting loop: img_size 224\n", "looks like VMamba's scaleup.py, but holds no numbers"),
        ("epoch,train_loss\nzero,1\n", "looks like timm, but could not convert string to float: 'zero'"),
    ],
)
def test_other_files_are_refused_by_name(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_log(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_curves_that_no_panel_shows(tmp_path, capsys):
    path = write(tmp_path, "step,epoch,dice\n9,0,0.5\n", "metrics.csv")
    assert main(["--log", str(path), "--out", str(tmp_path / "curves.png")]) == 2
    assert "holds none of the curves that are drawn (train/loss, " in capsys.readouterr().err


def test_curves_of_many_logs(tmp_path, capsys):
    logs = [write(tmp_path / "swin", SWIN), write(tmp_path / "mm", SCALARS)]
    ours(tmp_path / "run")
    out, table = tmp_path / "deep" / "curves.png", tmp_path / "other" / "curves.csv"
    command = ["--run", tmp_path / "run", "--log", *logs, "--out", out, "--csv", table]
    assert main(list(map(str, command))) == 0
    assert capsys.readouterr().out.split() == [str(out), str(table)] and Image.open(out).size[0] > 1000
    rows = list(csv.DictReader(table.open()))
    assert {(row["log"], row["unit"]) for row in rows} == {("run", "epoch"), ("some", "epoch")}
    found = {(row["log"], row["curve"], row["x"]): row["y"] for row in rows}
    assert found["run", "train/loss", "1.0"] == "1.5" and found["run", "train/grad_norm", "0.5"] == ""
    assert found["some", "val/ema_top1", "1"] == "10.5" and found["some", "val/coco/bbox_mAP", "2.0"] == "0.412"


def test_drawn_numbers(tmp_path):
    logs = [read_log(write(tmp_path / "a", SWIN)), read_log(write(tmp_path / "b", SCALARS))]
    panels = {axes.get_title(): axes for axes in loss.draw(logs).axes}
    assert list(panels) == [
        "loss",
        "validation accuracy",
        "average precision",
        "learning rate",
        "gradient before clipping",
    ]
    drawn = {line.get_label(): list(line.get_ydata()) for line in panels["average precision"].lines}
    assert drawn == {"some boxes": pytest.approx([12.5, 41.2]), "some masks": pytest.approx([10.0, 37.5])}
    assert [list(line.get_ydata()) for line in panels["validation accuracy"].lines] == [[76.123], [10.5]]


def test_the_legend_is_where_no_curve_can_be(tmp_path):
    """One, below all panels, with every log and every style once; none inside of a panel."""
    figure = loss.draw([read_log(write(tmp_path / "a", SWIN)), read_log(write(tmp_path / "b", SCALARS))])
    assert all(axes.get_legend() is None for axes in figure.axes)
    [legend] = figure.legends
    figure.draw_without_rendering()
    lowest = min(axes.get_tightbbox().y0 for axes in figure.axes)
    assert legend.get_window_extent().y1 <= lowest
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:2] == ["some", "some"] and len(labels[2:]) == len(set(labels[2:])) > 2


def test_errors_are_one_line(tmp_path, capsys):
    mixed = [str(write(tmp_path / "a", SWIN)), str(write(tmp_path / "b", ITERATIONS))]
    out = tmp_path / "curves.png"
    assert main(["--log", *mixed, "--out", str(out)]) == 2
    assert main(["--log", str(tmp_path / "none.log"), "--out", str(out)]) == 2
    assert main(["--run", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert main(["--log", mixed[0], "--out", "curves.csv"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: some counts epochs, some counts iterations: draw them one by one"
    assert lines[1].startswith("error: cannot read log ") and "none.log" in lines[1]
    assert lines[2].startswith("error: ") and lines[2].endswith("does not exist; give the folder of a training run")
    assert lines[3] == "error: --out curves.csv does not end in .png"
    assert len(lines) == 4 and not out.exists()
