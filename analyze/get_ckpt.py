"""What is in a checkpoint, and official weights as a plain .safetensors file: today's names, no prefixes, nothing else.

No code from the file is run. Run and checkpoint folders of this repository and published names are taken, too.

examples:
  python analyze/get_ckpt.py                                        what the weights of runs/quickstart are
  python analyze/get_ckpt.py vssm1_tiny_0230s_ckpt_epoch_264.pth    what this file holds
  python analyze/get_ckpt.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny_s1l8.safetensors    converts it
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("get_ckpt.py", __doc__)
    add = parser.add_argument
    add(
        "source",
        type=Path,
        nargs="?",
        metavar="IN",
        help="file of torch.save, .safetensors, run folder, name (runs/quickstart, else a nano model that is trained "
        "for 20 s)",
    )
    add("target", type=Path, nargs="?", metavar="OUT", help="the .safetensors file to write, if any")
    add(
        "--which",
        default="auto",
        choices=("auto", "model", "ema"),
        help="auto: the plain weights, else the averaged",
    )
    add("--overwrite", action="store_true", help="replace OUT")
    return cli.start("get_ckpt", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
