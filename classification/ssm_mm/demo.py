"""Predictions of a trained detector or segmentor drawn over images."""

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS

from ssm_mm import checkpoints
from ssm_mm.arguments import add_weights_arguments
from ssm_mm.config import leave_out_backbone_weights, read_config
from ssm_mm.config_parts import plain_datasets, type_name
from ssm_train.common.errors import UserError


def demo_parser(prog: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=f"Draw {what} over images.")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--config", required=True, help="the config that the checkpoint was trained with")
    parser.add_argument("--checkpoint", required=True, help="weights of the whole model")
    add_weights_arguments(parser)
    parser.add_argument("--out-dir", type=Path, default=Path("demo"), help="folder for the pictures (demo)")
    parser.add_argument("--device", default="", help="cpu or cuda (CUDA where there is one)")
    return parser


def draw_predictions(args: argparse.Namespace, **drawing) -> list[Path]:
    """Predict and draw every image; returns the pictures' paths.

    Args:
        args: of `demo_parser`.
        drawing: arguments of the framework's visualizer, such as `pred_score_thr` of detectors.

    Raises:
        UserError: a file that is missing, unreadable or of another model.
    """
    missing = [str(path) for path in args.images if not path.is_file()]
    if missing:
        raise UserError(f"no such image: {', '.join(missing)}")
    cfg = read_config(args.config)
    leave_out_backbone_weights(cfg)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    checkpoints.load_strictly(model, args.checkpoint, checkpoints.Options(args.which, args.allow_nonfinite))
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    visualizer = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = checkpoints.dataset_meta(args.checkpoint)
    [first, *_] = plain_datasets(cfg.test_dataloader)
    steps = [step for step in first.pipeline if type_name(step) != "LoadAnnotations"]
    load, pipeline = Compose(steps[:1]), Compose(steps)
    written = []
    for number, path in enumerate(args.images):
        data = pseudo_collate([pipeline({"img_path": str(path), "img_id": number})])
        with torch.inference_mode():
            [sample] = model.test_step(data)
        # read as for the model, in RGB
        image = np.ascontiguousarray(load({"img_path": str(path)})["img"][..., ::-1].astype(np.uint8))
        np.random.seed(0)  # mmdet shades masks at random
        visualizer.add_datasample(path.stem, image, sample.cpu(), draw_gt=False, **drawing)
        out = args.out_dir / f"{path.stem}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        picture = cv2.cvtColor(np.ascontiguousarray(visualizer.get_image()), cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(out), picture):
            raise UserError(f"{out} cannot be written")
        written.append(out)
    return written
