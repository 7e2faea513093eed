"""Evaluate a segmentor on the test data of a config: mIoU, with --tta over scales and flips.

python segmentation/tools/test.py CONFIG CHECKPOINT [--tta] [--out FOLDER] [--show-dir DIR]
"""

import sys

from ssm_mm import arguments
from ssm_mm.packages import require
from ssm_train.common.command import run


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
        cfg.model = {**cfg.tta_model, "module": cfg.model}
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    if args.out:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    run_test(cfg, args.checkpoint)


if __name__ == "__main__":
    sys.exit(main())
