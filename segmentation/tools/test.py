"""Evaluate a segmentor on the test data of a config: its metrics, with --tta over scales and flips.

python segmentation/tools/test.py CONFIG CHECKPOINT [--tta] [--out FOLDER] [--show-dir DIR]
"""

import copy
import sys

from ssm_mm import arguments
from ssm_mm.packages import require
from ssm_train.common.command import run
from ssm_train.common.errors import UserError

_TTA_MODEL = {"type": "SegTTAModel"}
# of mmsegmentation's own configs
_TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
_WRITERS = ("IoUMetric", "CityscapesMetric", "MarineMetric")
_ANNOTATIONS = ("LoadAnnotations", "LoadBinaryMask")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: test(argv))


def test(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmsegmentation")
    from ssm_mm.config import testing_config  # when mmengine has been found
    from ssm_mm.training import run_test

    parser = arguments.test_parser(
        "segmentation/tools/test.py", "Evaluate a segmentor.", "folder for the predicted maps"
    )
    args = arguments.parse(parser, argv)
    cfg = testing_config(args)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    if args.tta:
        add_tta(cfg)
    if args.out:
        write_maps(cfg, args.out)
    run_test(cfg, args)


def add_tta(cfg) -> None:
    """Average over scales and mirror images, unless the config has another augmentation."""
    from ssm_mm.config_parts import plain_datasets

    for dataset in plain_datasets(cfg.test_dataloader):
        dataset.pipeline = copy.deepcopy(cfg.get("tta_pipeline")) or scaled_and_mirrored(dataset.pipeline)
    cfg.model = {**(cfg.get("tta_model") or _TTA_MODEL), "module": cfg.model}


def scaled_and_mirrored(pipeline: list) -> list:
    """A pipeline of tests, for six scales of the image and of its mirror image. Annotations stay as they are."""
    from ssm_mm.config_parts import type_name

    types = [type_name(step) for step in pipeline]
    annotations = [step for step, name in zip(pipeline, types, strict=True) if name in _ANNOTATIONS]
    # the last step packs
    steps = [step for step, name in zip(pipeline[:-1], types, strict=False) if name not in _ANNOTATIONS]
    if "Resize" not in types:
        steps.append({"type": "Resize", "scale_factor": 1.0, "keep_ratio": True})
    first = next(i for i, step in enumerate(steps) if type_name(step) == "Resize")
    choices = [
        [_scaled(step, ratio) for ratio in _TTA_SCALES] if type_name(step) == "Resize" else [step]
        for step in steps[first:]
    ]
    flips = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
    choices += [flips, *([step] for step in annotations), [{"type": "PackSegInputs"}]]
    return copy.deepcopy([*steps[:first], {"type": "TestTimeAug", "transforms": choices}])


def _scaled(resize: dict, ratio: float) -> dict:
    if not resize.get("scale"):
        return {**resize, "scale_factor": ratio * resize["scale_factor"]}
    scale = resize["scale"] if isinstance(resize["scale"], (tuple, list)) else (resize["scale"],) * 2
    return {**resize, "scale": tuple(round(ratio * side) for side in scale)}


def write_maps(cfg, folder: str) -> None:
    """Let the evaluator that can write the predicted maps do so. UserError where there is none."""
    from ssm_mm.config_parts import evaluators, type_name

    found = evaluators(cfg, "test")
    writer = next((evaluator for evaluator in found if type_name(evaluator) in _WRITERS), None)
    if writer is None:
        names = ", ".join(map(type_name, found)) or "none"
        raise UserError(f"--out {folder}: maps are written by {' or '.join(_WRITERS)}; test_evaluator has {names}")
    writer.output_dir = folder
    if type_name(writer) == "CityscapesMetric":
        # which would delete them
        writer.keep_results = True


if __name__ == "__main__":
    sys.exit(main())
