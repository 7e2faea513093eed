"""A page to try models on: what they say of a picture, where they look, and how fast they are. One or two side by side.

Drop or choose an image; click a pixel to see what the mixer's output there is made of: along VMamba's four routes, in
Vim's two directions, over VSSD's tokens at once. The page also shows the most probable classes, Grad-CAM, the effective
receptive field and the throughput on this machine. The figure can be downloaded as PNG, SVG and PDF, with the command
that makes the same.

examples:
  python analyze/app.py
  python analyze/app.py --checkpoint runs/quickstart runs/vim
  python analyze/app.py --checkpoint vmamba_tiny_s1l8.in1k vssd_tiny.mesa_in1k --port 8000
  python analyze/app.py --model vmamba_tiny_s1l8 --checkpoint OFFICIAL.pth

Needs gradio: pip install -r requirements-web.txt. Images have at most 20 MB and 89 megapixels. Nothing is written
outside of a temporary folder, which is gone when the page is closed by Ctrl-C. Only this machine can open it, unless
--host says otherwise.
"""

import argparse
import sys

from analyze import cli


def parser() -> argparse.ArgumentParser:
    parser = cli.command_line("app.py", __doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="P",
        help="to choose from, beside nano models with random weights: run or checkpoint folders, files, published "
        "names (runs/quickstart, else a nano model that is trained for 20 s)",
    )
    add("--model", nargs="+", metavar="NAME", help="their models; runs and published names tell themselves")
    cli.add_weights_arguments(parser)
    add("--size", type=int, help="pixels of the image's shorter side (the run's or the model's)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    add("--port", type=int, default=7860, help="(%(default)s)")
    cli.add_device_argument(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return cli.start("app", parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
