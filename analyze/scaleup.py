"""Accuracy, throughput and memory of trained models against the resolution of the images.

Every checkpoint is validated on DATA/val at every size. It is a run of this repository, or a file with the name of its
model in --model. Images are prepared as in the evaluation of its training, or as by its authors: resized as a whole
where that took whole images (size up to 32, or CROP_RATIO 1), else cropped to their centre. Throughput (inference) and
peak memory are measured as by tp.py, all models and sizes in turns.

--logs takes accuracies of former evaluations instead: SIZE=FOLDER with the metrics.json of `classification/main.py
--eval`, SIZE=FILE with the text of Swin's or VMamba's trainer, or FILE with what VMamba's analyze/scaleup.py printed.

examples:
  python analyze/scaleup.py
  python analyze/scaleup.py --checkpoint runs/quickstart runs/vim --data-path runs/data/digits --size 16 32 64
  python analyze/scaleup.py --model vmamba_tiny_s1l8 --checkpoint FILE.pth --data-path IMAGENET --size 224 288 384 512
  python analyze/scaleup.py --logs 224=runs/eval224 384=runs/eval384 vmamba_scaleup.log

The picture rings the size of the training. Beside FILE.png lie FILE.svg, FILE.pdf and FILE.csv.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("scaleup.py", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        "--checkpoints",
        type=Path,
        nargs="+",
        default=[],
        metavar="P",
        help="run folders, checkpoint folders or weight files (without --logs: runs/quickstart, else a nano model that "
        "is trained for 20 s)",
    )
    cli.add_weights_arguments(parser)
    add("--model", "--models", nargs="+", metavar="NAME", help="their models; our checkpoints tell themselves")
    add("--data-path", metavar="FOLDER", help="holds val/<class>/* (without --checkpoint: digits)")
    add("--dataset", default="folder", help="format of the data, as for classification/main.py (%(default)s)")
    sizes = [16, 24, 32, 48, 64, 96]
    add("--size", "--sizes", type=int, nargs="+", default=sizes, metavar="N", help="pixels a side (16 24 32 48 64 96)")
    add("--logs", nargs="+", default=[], metavar="[SIZE=]PATH", help="evaluations that were made before")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (%(default)s)")
    add("--batch", type=int, default=32, help="images of a step (%(default)s)")
    add("--rounds", type=int, default=3, help="turns of the measurement of throughput (%(default)s)")
    add("--seconds", type=float, default=0.1, help="length of a turn (%(default)s)")
    add("--workers", type=int, default=0, help="processes that load images (%(default)s)")
    add("--device", default="", choices=("", "cpu", "cuda"), help="(CUDA where there is one)")
    cli.add_out_argument(parser, "scaleup.png", "PNG to write")
    return cli.start("scaleup", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
