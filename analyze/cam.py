"""Where a model looks for a class: Grad-CAM and EigenCAM over images.

methods:
  gradcam   the activations of a layer, weighted by how much the logit of the class grows with each channel
            (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391)
  eigencam  their first principal component over the places of the map, which knows no class
            (Muhammad & Yeasin 2020, https://arxiv.org/abs/2008.00299)
both as in the package pytorch-grad-cam. Images are prepared as by predict.py, and shown as the model sees them.

examples:
  python analyze/cam.py
  python analyze/cam.py --checkpoint runs/quickstart --images FOLDER --class 3 --methods gradcam
  python analyze/cam.py --model vssd_tiny --checkpoint vssd_tiny.mesa_in1k --images photo.jpg --layer layers.2.blocks

Beside FILE.png lie FILE.svg, FILE.pdf and FILE.npz with the maps of all images and Grad-CAM's channel weights: `images`
and `classes`, and per image i and method I_METHOD_raw, I_METHOD_overlay and, of Grad-CAM, I_METHOD_weights.
"""

import sys
from pathlib import Path

from analyze import cli

METHODS = ("gradcam", "eigencam")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("cam.py", __doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    cli.add_images_argument(parser, default="12 digits, or two photographs")
    add("--class", dest="target", metavar="CLASS", help="its name or number (the predicted one)")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one per line")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--layer", metavar="NAME", help="whose output to look at (the last block of the last stage)")
    add("--size", type=int, help="side of the images in pixels (the run's or the model's)")
    cli.add_out_argument(parser, "cam.png", "PNG to write, with the first 48 images")
    cli.add_device_argument(parser)
    cli.add_range_argument(parser)
    return cli.start("cam", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
