"""What configs hold inside wrappers and lists, where their data lies, and what of it is missing."""

import pytest

pytest.importorskip("mmengine")
pytestmark = pytest.mark.dense

from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.dataset import BaseDataset  # noqa: E402

from ssm_mm.config_parts import add_evaluator, evaluators, plain_datasets, type_name  # noqa: E402
from ssm_mm.data_check import check_data, set_data_root  # noqa: E402
from ssm_train.common.errors import UserError  # noqa: E402


def plain(name, **values):
    return {"type": "CocoDataset", "data_root": "data/coco/", "ann_file": f"{name}.json", **values}


WRAPPED = {
    "type": "ConcatDataset",
    "datasets": [
        plain("a"),
        {"type": "RepeatDataset", "times": 2, "dataset": {"type": "ClassBalancedDataset", "dataset": plain("b")}},
        {"type": "MultiImageMixDataset", "dataset": {"type": "ConcatDataset", "datasets": [plain("c"), plain("d")]}},
    ],
}


def names(dataset):
    return [each.ann_file for each in plain_datasets(ConfigDict({"dataset": dataset}))]


def test_plain_datasets():
    assert names(plain("x")) == ["x.json"] and names(WRAPPED) == ["a.json", "b.json", "c.json", "d.json"]
    assert plain_datasets(None) == []


METRIC = {"type": "CocoMetric", "ann_file": "data/coco/x.json"}
OTHER = {"type": "IoUMetric"}


@pytest.mark.parametrize(
    ("evaluator", "expected"),
    [
        (None, []),
        (METRIC, [METRIC]),
        ([METRIC, OTHER], [METRIC, OTHER]),
        ({"metrics": METRIC}, [METRIC]),
        ({"type": "Evaluator", "metrics": [METRIC, OTHER]}, [METRIC, OTHER]),
    ],
)
def test_evaluators(evaluator, expected):
    cfg = Config({"test_evaluator": evaluator})
    assert evaluators(cfg, "test") == expected and evaluators(cfg, "val") == []
    add_evaluator(cfg, "test", {"type": "Dump"})
    assert evaluators(cfg, "test") == [*expected, {"type": "Dump"}]
    assert isinstance(cfg.test_evaluator, dict) == (evaluator is not None and "metrics" in evaluator)


def test_type_names():
    kinds = ["CocoDataset", "mmdet.CocoDataset", BaseDataset]
    assert [type_name(ConfigDict(type=kind)) for kind in kinds] == ["CocoDataset", "CocoDataset", "BaseDataset"]
    assert type_name(ConfigDict()) == ""


def test_missing_files_of_every_data_set_are_named(tmp_path):
    (tmp_path / "a.json").touch()
    cfg = Config({"train_dataloader": {"dataset": WRAPPED}})
    set_data_root(cfg, str(tmp_path))
    with pytest.raises(UserError) as caught:
        check_data(cfg, ("train", "val"))
    missing, layout, _ = str(caught.value).split("; ")
    assert missing == "missing data: " + ", ".join(str(tmp_path / f"{name}.json") for name in "bcd")
    assert layout.startswith(f"{tmp_path} must hold annotations/instances_train2017.json")


@pytest.mark.parametrize(
    ("roots", "before", "after"),
    [
        (["data/coco/", "data/coco/"], "data/coco/val.json", "new/val.json"),
        (["data/", "data/coco/"], "data/coco/val.json", "new/val.json"),  # the longer root
        (["data/coco/"], "elsewhere/val.json", "elsewhere/val.json"),
        ([None], "val.json", "new/val.json"),
        ([None], "/elsewhere/val.json", "/elsewhere/val.json"),
    ],
)
def test_a_data_root_moves_the_annotations_of_evaluators(roots, before, after):
    datasets = [plain("x", data_root=root) for root in roots]
    metrics = [{"type": "CocoMetric", "ann_file": before}, OTHER]
    loader = {"dataset": {"type": "ConcatDataset", "datasets": datasets}}
    cfg = Config({"val_dataloader": loader, "val_evaluator": metrics})
    set_data_root(cfg, "new")
    assert cfg.val_evaluator[0].ann_file == after and cfg.val_evaluator[1] == OTHER
    assert {dataset.data_root for dataset in plain_datasets(cfg.val_dataloader)} == {"new"}
