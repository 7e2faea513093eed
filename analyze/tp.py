"""Throughput and peak memory of models, of this repository and of timm, over image sizes: inference and training.

--model takes names of timm's registry, ours included, and names of sets: nano, tiny, small, base (ours beside Swin,
ConvNeXt and DeiT of that size). Models have no stochastic depth and random weights, images are synthetic; all variants
take turns, and images/s is the median over the rounds: analyze/throughput.py tells how they are measured.

A variant that runs out of memory, or fails, gets a cross in the picture, and the csv says why. The weights of all
models stay on the device and take up a part of its memory. The csv is written again at every step: if the system kills
the process, the variant in it that is "running" and has no peak memory was the one at work.

examples:
  python analyze/tp.py
  python analyze/tp.py --model vmamba_tiny_s1l8 resnet50 --size 224 --batch 16 --modes inference
  python analyze/tp.py --model tiny --size 224 384 512 640 738 1024 1248 --precisions fp32 bf16 --compile no yes \\
      --batch 64

Beside FILE.png lie FILE.svg, FILE.pdf and FILE.csv with a line for every variant.
"""

import sys

from analyze import cli

MODES = ("inference", "training")
PRECISIONS = ("fp32", "bf16")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("tp.py", __doc__)
    add = parser.add_argument
    add(
        "--model",
        "--models",
        nargs="+",
        default=["nano"],
        metavar="NAME",
        help="or nano, tiny, small, base (nano)",
    )
    add("--size", "--sizes", type=int, nargs="+", default=[32, 64, 128], metavar="N", help="pixels a side (32 64 128)")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="(both)")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="(fp32)")
    add("--compile", nargs="+", choices=("no", "yes"), default=["no"], help="torch.compile (no)")
    add("--batch", type=int, default=8, help="images of a step (%(default)s)")
    add("--rounds", type=int, default=5, help="turns of every variant (%(default)s)")
    add("--seconds", type=float, default=0.1, help="length of a turn (%(default)s)")
    add("--device", default="", choices=("", "cpu", "cuda"), help="(CUDA where there is one)")
    cli.add_out_argument(parser, "tp.png", "PNG to write")
    return cli.start("tp", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
