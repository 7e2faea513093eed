"""Dual-SAM through the tools: training, resuming, tests, pictures, and the configs."""

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
pytest.importorskip("py_sod_metrics")
pytestmark = [pytest.mark.dense, pytest.mark.usefixtures("fast_mmengine")]

from mmengine.logging import MessageHub  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from segmentation.data.camouflage import main as write_digits  # noqa: E402
from segmentation.dual_sam.connectivity import mask_probability  # noqa: E402
from segmentation.dual_sam.cost import dual_card  # noqa: E402
from segmentation.dual_sam.loss import mutual_weight  # noqa: E402
from segmentation.dual_sam.visualizer import connectivity_sheet  # noqa: E402
from segmentation.tools import get_flops, image_demo, test, train  # noqa: E402
from ssm_mm.checkpoints import read  # noqa: E402
from ssm_mm.config import read_config  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402
from tests.dense_tools import ROOT, Task, caller, metrics_of, recorded, refuses, shared_folder  # noqa: E402

FOLDER = ROOT / "configs/segmentation/dual_sam"
NANO = FOLDER / "dual_vmamba-nano_camouflage.py"
SAM = FOLDER / "dual-sam_25e_mas3k-512x512.py"
TASK = Task(
    "segmentation", NANO, ["train_cfg.max_iters=4", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=2"]
)
# SAM of 32 channels, on images of 64 pixels
TINY_SAM = {
    "backbone.img_size": 64,
    "backbone.model_args": {
        **{"embed_dim": 32, "depth": 4, "num_heads": 2, "neck_chans": 16},
        **{"window_size": 3, "global_attn_indexes": (1, 3)},
    },
    "prompt": {"in_channels": [32] * 4, "dim": 32, "img_size": 64, "heads": (2, 2)},
    "decode_head": {"in_channels": [32] * 4, "bottom_channels": 16, "channels": [8, 8, 16, 16]},
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Shared and read-only."""

    def fill(folder):
        assert write_digits(["--out", str(folder), "--train", "4", "--test", "2"]) == 0

    return shared_folder(tmp_path_factory, "dual-sam-digits", fill)


@pytest.fixture(scope="session")
def trained(digits, fast_mmengine, tmp_path_factory):
    """The work folder of a short training; shared and read-only."""

    def fill(folder):
        assert train.main([str(NANO), "--from-scratch", "--work-dir", str(folder), *TASK.flags(digits)]) == 0

    return shared_folder(tmp_path_factory, "dual-sam-trained", fill)


@pytest.fixture
def call(digits, capfd):
    return caller(TASK, digits, capfd)


def built(path=NANO, **model):
    cfg = read_config(str(path))
    cfg.merge_from_dict({f"model.{name}": value for name, value in model.items()})
    return MODELS.build(cfg.model)


def test_training_resumes(trained, call, tmp_path):
    first, last = (read(trained / f"iter_{count}.pth")["state_dict"] for count in (2, 4))
    for part in ("backbone.", "neck.", "prompt.levels.0.gates", "decode_head.decoders.0.", "decode_head.decoders.1."):
        names = [name for name in first if name.startswith(part) and first[name].is_floating_point()]
        assert names and any(not torch.equal(first[name], last[name]) for name in names), part
    shutil.copy(trained / "iter_2.pth", tmp_path)
    assert call(train, "--work-dir", tmp_path, "--resume").status == 0
    again = read(tmp_path / "iter_4.pth")
    assert again["meta"]["iter"] == 4 and again["optimizer"]["state"][0]["step"] == 4


def test_evaluation_and_maps(trained, call, digits, tmp_path):
    flags = ["--work-dir", tmp_path / "work", "--out", tmp_path / "maps", "--show-dir", tmp_path / "shown"]
    assert call(test, trained / "iter_4.pth", *flags).status == 0
    metrics = metrics_of(tmp_path / "work")
    wrong = []
    for path in sorted((digits / "test/Masks").iterdir()):
        truth, predicted = (np.asarray(Image.open(image)) for image in (path, tmp_path / "maps" / path.name))
        wrong.append((truth != predicted).mean())
    assert metrics["MAE"] == pytest.approx(np.mean(wrong), abs=1e-4)
    assert metrics["MAE"] == recorded(trained, "MAE")["MAE"]
    shown = sorted(Image.open(path).size for path in (tmp_path / "shown").rglob("*.png"))
    sides = sorted(Image.open(path).size for path in (digits / "test/Image").iterdir())
    assert shown == sorted(size_of_picture(*side) for side in sides)


def test_tta_averages_probabilities(trained, call, tmp_path):
    assert call(test, trained / "iter_4.pth", "--work-dir", tmp_path, "--tta").status == 0
    assert 0 <= metrics_of(tmp_path)["MAE"] <= 1


def size_of_picture(width: int, height: int) -> tuple[int, int]:
    """Of an image enlarged to 640 pixels of width or more, with two rows of maps below it, each under its name."""
    times = math.ceil(640 / width)
    return times * width, times * height + 2 * (18 + round(times * width / 4 * height / width))


def test_demo_draws_the_connectivity(trained, digits, tmp_path):
    image = next((digits / "test/Image").iterdir())
    flags = ["--config", str(NANO), "--checkpoint", str(trained / "iter_4.pth"), "--device", "cpu"]
    assert image_demo.main([str(image), *flags, "--out-dir", str(tmp_path)]) == 0
    drawn, original = (np.asarray(Image.open(path)) for path in (tmp_path / image.name, image))
    height, width = original.shape[:2]
    assert drawn.shape == (*size_of_picture(width, height)[::-1], 3)
    top = height * drawn.shape[1] // width
    assert (drawn[top:] == drawn[top:, :, :1]).all()  # grey


def test_sheet_of_maps():
    maps = torch.zeros(8, 40, 60)
    maps[5] = 1
    sheet = connectivity_sheet(maps, width=122)
    assert sheet.shape == (2 * (18 + 20), 122, 3)
    cells = sheet[:, :120].reshape(2, 38, 4, 30, 3).swapaxes(1, 2).reshape(8, 38, 30, 3)
    assert all(0 < cell[:18].mean() < 128 for cell in cells)  # names, white on black
    assert [(cell[18:] == 255).all() for cell in cells] == [i == 5 for i in range(8)]


def test_predictions_of_any_size():
    model = built().eval()
    for size in ((50, 77), (128, 96)):
        sample = SegDataSample(metainfo={"ori_shape": (31, 40), "img_shape": size})
        with torch.inference_mode():
            [found] = model.predict(torch.randn(1, 6, *size), [sample])
        assert found.connectivity.data.shape == (8, *size)
        assert found.seg_logits.data.shape == found.pred_sem_seg.data.shape == (1, 31, 40)
        assert torch.equal(found.pred_sem_seg.data > 0, found.seg_logits.data > 65 / 255)


def test_a_prediction_is_the_decoded_connectivity():
    model = built().eval()
    with torch.inference_mode():
        [found] = model.predict(torch.randn(1, 6, 64, 64))
    expected = mask_probability(found.connectivity.data[None])
    assert torch.allclose(found.seg_logits.data, expected, atol=1e-5)


def test_legacy_swaps_the_maps_of_the_decoders():
    new, old = (built(legacy=legacy).eval() for legacy in (False, True))
    weights = {name: value for name, value in new.state_dict().items() if not name.endswith("gates")}
    old.load_state_dict(weights)
    with torch.inference_mode():
        features = new.extract_feat(torch.randn(1, 6, 64, 64))
        (image, bottom), (gamma, gamma_bottom) = features
        swapped = new.decode_head(((gamma, bottom), (image, gamma_bottom)))
        for found, expected in zip(old.decode_head(features), swapped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        [sample] = old.predict(torch.randn(1, 6, 32, 32))
    assert sample.legacy and old.prompt.levels[0].legacy and not new.prompt.levels[0].legacy


def samples_of(labels):
    """(B, H, W) of classes -> annotated samples."""
    samples = [SegDataSample() for _ in labels]
    for sample, label in zip(samples, labels, strict=True):
        sample.gt_sem_seg = PixelData(data=label[None])
    return samples


@pytest.fixture
def epoch_20_of_25():
    hub = MessageHub.get_current_instance()
    hub.update_info_dict({"epoch": 20, "max_epochs": 25, "iter": 0, "max_iters": 1})


def test_every_parameter_but_sam_s_learns(epoch_20_of_25):
    """As distributed training needs it; in mixed precision; on images whose sides are no multiples of the patch."""
    model = built(SAM, **TINY_SAM)
    for level in model.prompt.levels:
        level.gates.data.fill_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(torch.randn(2, 6, 60, 64), samples_of((torch.rand(2, 60, 64) < 0.3).long()))
    assert set(losses) == {"decode.loss_connectivity", "decode.loss_mutual"}
    sum(losses.values()).backward()
    added = ("a_q", "b_q", "a_v", "b_v", "mlp.image", "mlp.gamma")
    for name, value in model.named_parameters():
        frozen = name.startswith("backbone.sam.") and not any(f".{part}." in name for part in added)
        assert value.requires_grad != frozen and (value.grad is None) == frozen, name
        assert frozen or value.grad.isfinite().all(), name


def test_mutual_supervision_follows_the_epochs(epoch_20_of_25):
    model, labels = built(), torch.zeros(1, 64, 64, dtype=torch.long)
    model.eval()
    inputs = torch.randn(1, 6, 64, 64)
    late = model.loss(inputs, samples_of(labels))
    MessageHub.get_current_instance().update_info_dict({"max_epochs": 1, "iter": 3, "max_iters": 12})
    early = model.loss(inputs, samples_of(labels))
    ratio = mutual_weight(20 / 25) / mutual_weight(3 / 12)
    assert float(late["decode.loss_mutual"] / early["decode.loss_mutual"]) == pytest.approx(ratio, rel=1e-4)
    assert float(late["decode.loss_connectivity"]) == pytest.approx(float(early["decode.loss_connectivity"]))
    assert set(built(**{"decode_head.mutual": False}).loss(inputs, samples_of(labels))) == {"decode.loss_connectivity"}


# ---- configs ----

# millions of parameters and billions of MACs for an image of 512x512, as in docs/dual_sam.md
COSTS = {
    "dual-sam_25e_mas3k-512x512": (161.58, 342.9),
    "dual_vmamba-tiny-s1l8_25e_mas3k-512x512": (54.72, 107.6),
    "dual_vssd-tiny_25e_mas3k-512x512": (47.83, 102.2),
    "dual_vim-tiny_25e_mas3k-512x512": (30.67, 77.6),
    "dual_swin-tiny_25e_mas3k-512x512": (52.76, 107.4),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_those_of_the_table(name):
    counted = dual_card(read_config(str(FOLDER / f"{name}.py")), (512, 512))
    found = (round(counted.parameters / 1e6, 2), round(counted.macs / 1e9, 1))
    assert found == COSTS[name]
    row = f"| `{name.split('_25e')[0]}` | {found[0]:.2f} M | {found[1]:.1f} G |"
    assert row in (ROOT / "docs/dual_sam.md").read_text()


def test_data_and_schedule_are_the_published():
    names = sorted(path.stem for path in FOLDER.glob("dual-sam_*.py"))
    assert names == [f"dual-sam_25e_{data}-512x512" for data in ("mas3k", "rmas", "ruwi", "ufo120", "usod10k")]
    for name in names:
        cfg = read_config(str(FOLDER / f"{name}.py"))
        data = name.split("_")[-1].split("-")[0].upper()
        for split in ("train", "val", "test"):
            dataset = cfg[f"{split}_dataloader"].dataset
            assert dataset.type == "MarineDataset" and dataset.data_root == f"data/{data}"
            [resize] = [step for step in dataset.pipeline if step.type == "Resize"]
            assert tuple(resize.scale) == (512, 512) and not resize.keep_ratio
        optimizer, [steps] = cfg.optim_wrapper.optimizer, cfg.param_scheduler
        assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (25, 5)
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-3, 0.1)
        assert (steps.milestones, steps.gamma) == ([10, 20], 0.1)
        assert not cfg.model.get("legacy", False) and "find_unused_parameters" not in cfg


def test_get_flops(capsys):
    assert get_flops.main([str(NANO), "--shape", "128", "64"]) == 0
    head, *rows, total = capsys.readouterr().out.splitlines()[-6:]
    assert "128x64" in head
    assert [row.split()[0] for row in rows] == ["backbone", "neck", "prompt", "decode_head"]
    assert total.split()[1] == f"{sum(value.numel() for value in built().parameters()) / 1e6:.3f}"
    assert get_flops.main([str(NANO), "--shape", "100", "64"]) == 2
    assert "100x64 pixels: both must be multiples of 16" in capsys.readouterr().err


# ---- mistakes ----


def test_mistakes(call, digits, tmp_path):
    flags = ["--from-scratch", "--work-dir", tmp_path / "work"]
    refuses(call(train, *flags, root=tmp_path), "missing data", "train/Image", "test/Masks", "--data-root DIR")
    broken = shutil.copytree(digits, tmp_path / "broken")
    [first, *_] = sorted((broken / "train/Masks").iterdir())
    first.unlink()
    refuses(call(train, *flags, root=broken), "1 of 4 images without mask: 000001.png")
    Image.new("L", (5, 5)).save(first)
    refuses(call(train, *flags, root=broken), "000001.png has 5x5 pixels, its image")
    refuses(call(train, *flags, options=["model.decode_head.doublings=[1,1]"]), "not of the same levels")


def test_a_training_needs_sam_s_weights():
    """mmengine initialises the model when a training begins."""
    with pytest.raises(UserError, match="SAM's encoder has no weights and is frozen"):
        built(SAM, **TINY_SAM).init_weights()


@pytest.mark.full
def test_two_processes(digits, tmp_path):
    """dist_train.sh and dist_test.sh with gloo."""
    TASK.launch("dist_train.sh", 2, "--from-scratch", "--work-dir", "work", data=digits, cwd=tmp_path, port=29653)
    TASK.launch("dist_test.sh", "work/iter_4.pth", 2, "--work-dir", "eval", data=digits, cwd=tmp_path, port=29653)
    assert 0 <= metrics_of(tmp_path / "eval")["MAE"] <= 1
