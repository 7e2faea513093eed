"""What the training loop costs beside the model: its updates against bare forward, backward and optimizer steps.

Both train the configured model on the same random images, held in memory, in turns. The loop does all that a run does
(seeding, mixing, clipping, averaging, checks, records) but reading images and checkpoints: reading overlaps with
training in worker processes, and its rest is the data-wait share of a run's report.

examples:
  python analyze/loop_overhead.py
  python analyze/loop_overhead.py --cfg configs/classification/vim/vim_nano_digits.yaml --batch-size 64 --repeats 40
"""

import sys

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("loop_overhead.py", __doc__)
    add = parser.add_argument
    add("--cfg", metavar="FILE", help="config of a training (vmamba_nano on the digits)")
    add("--batch-size", type=int, default=128, help="(%(default)s)")
    add("--updates", type=int, default=8, help="per measurement (%(default)s)")
    add("--repeats", type=int, default=10, help="pairs of measurements (%(default)s)")
    add("--device", choices=("", "cpu", "cuda"), default="", help="(CUDA where there is one)")
    cli.add_out_argument(parser, "loop_overhead.json", "numbers to write")
    return cli.start("loop_overhead", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
