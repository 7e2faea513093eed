"""modelcard.sh: every row has its config, a model of the zoo and arguments that the tools accept."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ssm_models.model_card import registered_models
from ssm_train import cli as classifier
from ssm_train.config.load import load_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "modelcard.sh"
WEIGHTS = "/weights/model.pth"


def modelcard(*arguments, script=SCRIPT, **environment):
    clean = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=clean, cwd=script.parent
    )


@pytest.fixture(scope="module")
def commands():
    """All commands as lists of words, by task."""
    done = modelcard("--dry-run", CKPT=WEIGHTS, GPUS="4", DATA_PATH="/images")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    by_task = {"classification": [], "detection": [], "segmentation": []}
    for words in lines:
        [task] = {task for task in by_task if any(word.startswith(f"{task}/") for word in words)}
        by_task[task].append(words)
    return by_task


def listed():
    rows = [re.split(r"  +", line) for line in modelcard("--list").stdout.splitlines()]
    return {name: published for name, published, _ in rows}


def test_every_published_row_is_listed():
    metrics = [published.split()[0] for published in listed().values()]
    assert {metric: metrics.count(metric) for metric in set(metrics)} == {"top-1": 21, "AP": 19, "mIoU": 11}
    assert listed()["vmamba_tiny_s1l8"] == "top-1 82.6"
    assert listed()["mask-rcnn_vssd-small_fpn_ms-crop-3x_coco"] == "AP 50.0 / 44.6"
    assert listed()["upernet_vmamba-base-s2l15_160k_ade20k-512x512"] == "mIoU 51.0, tta 51.6"


def test_numbers_are_those_in_the_docs_of_the_configs():
    for name, published in listed().items():
        [path] = ROOT.glob(f"configs/*/*/{name}.*")
        head = path.read_text().split("_base_")[0]
        for number in re.findall(r"\d\d\.\d", published):
            # a classifier's yaml with MESA does not repeat it
            assert number in head or path.suffix == ".yaml", (name, number)


def test_classifiers(commands):
    names = [name for name in listed() if "-" not in name]
    tests = [words for words in commands["classification"] if "--eval" in words]
    trainings = [words for words in commands["classification"] if "--eval" not in words]
    assert len(tests) == len(trainings) == len(names)
    for words in tests:
        assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=4", "classification/main.py"]
        args = classifier.parse_args(words[4:])
        assert (args.eval, args.pretrained, args.data_path) == (True, WEIGHTS, "/images")
        assert load_config(str(ROOT / args.cfg)).MODEL.NAME in registered_models()
    for words in trainings:
        assert words[:5] == [
            "env",
            "DATA_PATH=/images",
            "GPUS=4",
            f"PRETRAINED={WEIGHTS}",
            "classification/scripts/train.sh",
        ]
        assert load_config(str(ROOT / "configs/classification" / words[5])).MODEL.NAME in registered_models()


@pytest.mark.dense
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_detectors_and_segmentors(commands, task):
    command = pytest.importorskip("ssm_mm.command")
    from ssm_mm.config import read_config

    seen = set()
    for _, tool, *words in commands[task]:
        assert (ROOT / tool).is_file()
        config = words[0]
        if tool == f"{task}/tools/dist_train.sh":
            assert words[1] == "4"
            args = command.train_parser("train", "").parse_args([config, "--launcher", "pytorch", *words[2:]])
            backbone = read_config(str(ROOT / config), args.cfg_options).model.backbone
            assert backbone.checkpoint == WEIGHTS and backbone.name in registered_models()
            seen.add((config, "train"))
        else:
            assert tool == f"{task}/tools/dist_test.sh" and words[2] == "4"
            parser = command.test_parser("test", "", "")
            args = parser.parse_args([config, words[1], "--launcher", "pytorch", *words[3:]])
            assert args.checkpoint == WEIGHTS
            seen.add((config, "tta" if args.tta else "test"))
    names = {Path(config).stem for config, _ in seen}
    prefix = "upernet" if task == "segmentation" else ("mask-rcnn", "cascade")
    assert names == {name for name in listed() if name.startswith(prefix)}
    assert len(seen) == 3 * len(names) == len(commands[task])


@pytest.fixture
def tree(tmp_path):
    """The script beside a tool that prints what it gets."""
    folder = tmp_path / "copy"
    name = "mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco"
    for path in ("detection/tools", "configs/detection/vmamba"):
        (folder / path).mkdir(parents=True)
    (folder / f"configs/detection/vmamba/{name}.py").touch()
    for weights in ("w.pth", "my w.pth"):
        (folder / weights).touch()
    for tool in ("dist_test", "dist_train"):
        (folder / f"detection/tools/{tool}.sh").write_text('printf "[%s]" "$@"\n')
    shutil.copy(SCRIPT, folder)
    return folder, name


def test_it_runs_the_tool_with_weights_in_their_place(tree):
    folder, name = tree
    config = f"[configs/detection/vmamba/{name}.py]"
    script, weights = folder / "modelcard.sh", f"[{folder}/w.pth]"
    done = modelcard(name, "tta", "--data-root", "my data", script=script, CKPT="w.pth", GPUS="2")
    assert done.stdout == f"{config}{weights}[2][--tta][--data-root][my data]"
    assert modelcard(name, script=script, CKPT="my w.pth").stdout == f"{config}[{folder}/my w.pth][8]"
    done = modelcard(name, "train", "--amp", script=script, CKPT="w.pth")
    assert done.stdout == f"{config}[8][--cfg-options][model.backbone.checkpoint={weights[1:]}[--amp]"


def test_a_path_that_cfg_options_would_change_is_refused(tree):
    folder, name = tree
    done = modelcard(name, "train", script=folder / "modelcard.sh", CKPT="my w.pth")
    assert done.returncode == 2 and "may hold no space" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no name given"),
        (["vmamba_tiny"], {}, "vmamba_tiny is not in the list"),
        (["vmamba_tiny_s1l8"], {}, "CKPT is not set: .*vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        (["vim_tiny_patch16_stride8_224", "train"], {}, "CKPT is not set"),
        (["vmamba_tiny_s1l8"], {"CKPT": "no.pth"}, "CKPT /.*/no.pth does not exist"),
        (["vmamba_tiny_s1l8", "tta"], {}, "is a classifier"),
        (["vmamba_tiny_s1l8", "eval"], {}, "'eval' is not one of test, tta, train"),
        (["vmamba_tiny_s1l8", "--dry-run"], {"GPUS": "0"}, "GPUS is '0'"),
    ],
)
def test_it_refuses_in_one_line(arguments, environment, message):
    done = modelcard(*arguments, **environment)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr)
