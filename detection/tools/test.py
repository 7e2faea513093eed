"""Evaluate a detector on the test data of a config: box and mask AP.

python detection/tools/test.py CONFIG CHECKPOINT [--tta] [--out predictions.pkl] [--show-dir DIR]
"""

import copy
import sys

from ssm_mm import arguments
from ssm_mm.packages import require
from ssm_train.common.command import run
from ssm_train.common.errors import UserError

_TTA_MODEL = {"type": "BoxTTAModel", "tta_cfg": {"nms": {"type": "nms", "iou_threshold": 0.5}, "max_per_img": 100}}
_META_KEYS = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: test(argv))


def test(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmdet")
    import detection.tta  # noqa: F401  registers; when mmdet has been found
    from ssm_mm.config import testing_config
    from ssm_mm.config_parts import add_evaluator
    from ssm_mm.training import run_test

    parser = arguments.test_parser("detection/tools/test.py", "Evaluate a detector.", "pickle file for the predictions")
    args = arguments.parse(parser, argv)
    cfg = testing_config(args)
    if args.show_dir:
        cfg.default_hooks.visualization.test_out_dir = args.show_dir
    if args.tta:
        add_tta(cfg)
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            raise UserError(f"--out {args.out} must end in .pkl")
        add_evaluator(cfg, "test", {"type": "DumpDetResults", "out_file_path": args.out})
    run_test(cfg, args)


def add_tta(cfg) -> None:
    """Test both the image and its mirror image, merged by NMS, unless the config has another augmentation."""
    from ssm_mm.config_parts import evaluators, plain_datasets

    for dataset in plain_datasets(cfg.test_dataloader):
        dataset.pipeline = copy.deepcopy(cfg.get("tta_pipeline")) or mirrored(dataset.pipeline)
    cfg.model = {**(cfg.get("tta_model") or _TTA_MODEL), "module": cfg.model}
    for evaluator in evaluators(cfg, "test"):
        if "segm" in evaluator.get("metric", ()):
            print("--tta: boxes alone are evaluated, as masks are not merged")
            evaluator.metric = ["bbox"]


def mirrored(pipeline: list) -> list:
    """A pipeline of tests, for the image and its mirror image."""
    flips = [{"type": "RandomFlip", "prob": 1.0}, {"type": "RandomFlip", "prob": 0.0}]
    pack = {"type": "PackDetInputs", "meta_keys": _META_KEYS}
    return [*copy.deepcopy(pipeline[:-1]), {"type": "TestTimeAug", "transforms": [flips, [pack]]}]


if __name__ == "__main__":
    sys.exit(main())
