"""Models for other runtimes: ONNX and torch.export files, written only if they compute what the model computes.

  python analyze/export.py --checkpoint runs/quickstart --out runs/quickstart/model.onnx
  python analyze/export.py --model vmamba_tiny_s1l8 --scan custom --out model.onnx
  python analyze/export.py --checkpoint runs/quickstart --int8 DIGITS/train --data-path DIGITS --out model.int8.onnx

The graph of an ONNX file takes any batch, height and width. Its scans are standard operators ("portable", for every
runtime), or nodes for the library of ssm_ops.onnxruntime ("custom", fast). A .pt2 file is of PyTorch's own operators
alone, for any batch at one size; one that ends in .aoti.pt2 is compiled for this machine and runs without Python.
Beside every file lies FILE.json: how images become input, what comes out, and the differences found.
docs/deployment.md tells the rest.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("export.py", __doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    add("--size", type=int, nargs="+", metavar="H [W]", help="of the images (the run's or the model's)")
    cli.add_images_argument(parser, default="to compare on, up to 16: two photographs")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one per line (ImageNet's for 1000)")
    add("--out", type=Path, nargs="+", metavar="FILE", help=".onnx, .pt2 and .aoti.pt2 files to write (MODEL.onnx)")
    add("--scan", choices=("portable", "custom"), default="portable", help="form of the scans (%(default)s)")
    add("--opset", type=int, metavar="N", help="version of ONNX's operators (20)")
    add(
        "--weights",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="as which the weights are stored; ONNX files compute in float32 all the same (%(default)s)",
    )
    add("--int8", type=Path, metavar="FOLDER", help="quantise all but the scans; images to find the ranges from")
    add(
        "--data-path",
        type=Path,
        metavar="FOLDER",
        help="prints the accuracy on its val/<class>/*, of the file and others",
    )
    add("--tolerance", type=float, help="largest difference of a logit (1e-4; 0.01, 0.1 and 1 for 16 bits and int8)")
    cli.add_range_argument(parser)
    return cli.start("export", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
