"""Parameters and multiply-accumulates of a segmentor, by part, as the papers' tables count them.

python segmentation/tools/get_flops.py CONFIG [--shape 2048 512]
"""

import argparse
import sys

from ssm_mm.packages import require
from ssm_train.common.command import run


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(lambda: get_flops(argv))


def get_flops(argv: list[str] | None) -> None:
    """Raises UserError."""
    require("mmsegmentation")
    from ssm_mm.config import read_config  # when mmengine has been found
    from ssm_mm.flops import dense_card

    parser = argparse.ArgumentParser(prog="segmentation/tools/get_flops.py", description="Count a segmentor.")
    parser.add_argument("config", help="a file of configs/, or any config of a encoder-decoder")
    parser.add_argument(
        "--shape", type=int, nargs=2, default=(2048, 512), metavar=("WIDTH", "HEIGHT"), help="pixels (2048 512)"
    )
    args = parser.parse_args(argv)
    width, height = args.shape
    cfg = read_config(args.config)
    if cfg.model.type == "DualSAM":
        from segmentation.dual_sam.cost import dual_card

        print(dual_card(cfg, (height, width)))
        return
    print(dense_card(cfg, (height, width)))


if __name__ == "__main__":
    sys.exit(main())
