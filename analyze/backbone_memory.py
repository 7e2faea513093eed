"""Memory of detectors' backbones, forward and backward: ours beside mmdet's Swin-T, in the same run.

The most that PyTorch had handed out at once for activations, gradients and temporaries during one step in fp32 on one
image, weights left out; see analyze/memory.py for how it is counted. All outputs of the backbones get a gradient.
Without mmdet (bash install_dense.sh) Swin-T is left out, and it says so.

examples:
  python analyze/backbone_memory.py
  python analyze/backbone_memory.py --model vmamba_tiny_s1l8 vssd_tiny --size 800 1280 --out memory.csv
"""

import sys

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("backbone_memory.py", __doc__)
    add = parser.add_argument
    model = ["vmamba_tiny_s1l8"]
    add("--model", "--models", nargs="+", default=model, metavar="NAME", help="(vmamba_tiny_s1l8)")
    add("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"), help="(480 640)")
    add("--device", default="", choices=("", "cpu", "cuda"), help="(CUDA where there is one)")
    cli.add_out_argument(parser, "backbone_memory.csv", "csv to write")
    return cli.start("backbone_memory", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
