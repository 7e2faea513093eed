"""segmentation/tools/train.py: training, resuming, and what it refuses."""

import shutil

import pytest
import torch

pytest.importorskip("mmseg")
pytestmark = pytest.mark.dense

from segmentation.tools import train as tool  # noqa: E402
from ssm_mm.checkpoints import read  # noqa: E402
from tests.dense_tools import metrics_of, refuses  # noqa: E402


def test_training_resumes(trained, call, tmp_path):
    first, last = (read(trained / f"iter_{count}.pth")["state_dict"] for count in (2, 4))
    assert not torch.equal(first["decode_head.conv_seg.weight"], last["decode_head.conv_seg.weight"])
    shutil.copy(trained / "iter_2.pth", tmp_path)
    (tmp_path / "iter_4.pth").write_bytes((trained / "iter_4.pth").read_bytes()[:-1000])
    status, out, _ = call(tool, "--work-dir", tmp_path, "--resume")
    assert status == 0 and f"left out: checkpoint {tmp_path}/iter_4.pth is damaged" in out
    again = read(tmp_path / "iter_4.pth")
    assert again["meta"]["iter"] == 4 and again["optimizer"]["state"][0]["step"] == 4


def test_mistakes(call, data, tmp_path):
    train = ["--from-scratch", "--work-dir", tmp_path]
    refuses(call(tool), "the backbone vmamba_nano has no weights", "--from-scratch")
    refuses(call(tool, "--from-scratch", root=tmp_path), "missing data", "images/training", "annotations/validation")
    refuses(
        call(tool, *train, options=["model.decode_head.num_classes=150"]),
        "decode_head.num_classes is 150, but the data has 11 classes",
    )
    refuses(
        call(tool, *train, options=["model.backbone.pretrained=vssm.pth"]),
        "SSMBackbone: pretrained is called checkpoint here",
    )
    broken = shutil.copytree(data, tmp_path / "ade")
    for path in (broken / "images/training").iterdir():
        path.write_bytes(b"")
    refuses(call(tool, *train, root=broken), ".png is an empty file")


@pytest.mark.full
def test_two_processes_from_another_folder(task, data, tmp_path):
    """dist_train.sh and dist_test.sh with gloo, one batch norm per process."""
    task.launch("dist_train.sh", 2, "--from-scratch", "--work-dir", "work", data=data, cwd=tmp_path, port=29651)
    task.launch("dist_test.sh", "work/iter_4.pth", 2, "--work-dir", "eval", data=data, cwd=tmp_path, port=29651)
    assert 0 <= metrics_of(tmp_path / "eval")["mIoU"] <= 100


def test_states_of_another_training(trained, call, tmp_path):
    """A moment of another shape, which compiled updates would read beyond its end."""
    content = read(trained / "iter_2.pth")
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(content, tmp_path / "iter_2.pth")
    outcome = call(tool, "--work-dir", tmp_path, "--resume", tmp_path / "iter_2.pth")
    fault = "does not fit this training: its optimizer has for parameter 0 a 'exp_avg'"
    refuses(outcome, f"{tmp_path}/iter_2.pth {fault}", "load_from=")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_checkpoint_deletes_nothing(trained, call, tmp_path, kind):
    """mmengine removes what a checkpoint calls the best one so far, with all that is below it."""
    victim = tmp_path / "home"
    victim.mkdir()
    (victim / "best_thesis.pth").write_text("ten years")
    content = read(trained / "iter_2.pth")
    best = victim if kind == "folder" else victim / "best_thesis.pth"
    info = {"best_score": -1.0, "best_ckpt": str(best), "keep_ckpt_ids": ["/../home/best_thesis"]}
    content["message_hub"]["runtime_info"].update(info)
    content["meta"]["seed"] = "no number"
    torch.save(content, tmp_path / "iter_2.pth")
    options = ["default_hooks.checkpoint.save_best=mIoU", "default_hooks.checkpoint.max_keep_ckpts=1"]
    work = tmp_path / "work"
    outcome = call(tool, "--work-dir", work, "--resume", tmp_path / "iter_2.pth", options=options)
    assert outcome.status == 0 and len(list(work.glob("best_mIoU_*.pth"))) == 1, outcome.err
    assert (victim / "best_thesis.pth").read_text() == "ten years"
