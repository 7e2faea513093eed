"""Effective receptive fields: which pixels of an image the last feature map's middle responds to, models side by side.

As in RepLKNet and VMamba: images are resized to size x size. The features of the middle token, before the final norm,
are rectified and summed over channels. The gradient of that sum with respect to the image is rectified, summed over
colours, and averaged over images.

The upper row has models with random weights, the lower one the same models with the weights of their checkpoints, or
timm's with --pretrained. Any model of timm that gives feature maps will do. Random weights are neutral: every block
takes part. timm starts some norms and layer scales at (nearly) zero, so that a block does nothing before it is trained;
here they start at one. Else the field of a new ResNet or ConvNeXt would show its stem and its downsampling alone.

The field of Vim with random weights lies on one side. As published, the scan backwards starts with step sizes of
softplus(0) = 0.69, with which it forgets a token after one or two steps; the scan forwards starts with 0.001 to 0.1,
with which it remembers whole rows. So the middle sees what is above it and to its left. A short training widens the
field, and leaves it on that side.

examples:
  python analyze/erf.py
  python analyze/erf.py --model vmamba_nano vim_nano resnet18 --checkpoint runs/quickstart - - --images DIGITS/val
  python analyze/erf.py --model vmamba_tiny_s1l8 convnext_tiny --checkpoint vmamba_tiny_s1l8.in1k - --pretrained
  python analyze/erf.py --preset vmamba --images IMAGENET/val      figure of the VMamba paper: 50 images at 1024 pixels

Prints, and writes to FILE.csv, the side of the smallest square in the middle that holds 20, 30, 50 and 99 % of the sum,
and its share of the image's area; FILE.npz holds the fields; FILE.svg and FILE.pdf are the picture again.
"""

import sys

from analyze import cli

PRESETS = {
    "vmamba": (
        ("resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "vmamba_tiny_s1l8"),
        1024,
        50,
    )
}
"""Models, size and number of images of published figures (Liu et al. 2024, https://arxiv.org/abs/2401.10166)."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("erf.py", __doc__)
    add = parser.add_argument
    add("--model", "--models", nargs="+", metavar="NAME", help="(vmamba_nano vim_nano vssd_nano resnet18)")
    add(
        "--checkpoint",
        "--checkpoints",
        nargs="+",
        metavar="PATH",
        help="one for each model, - for none (none; without --model that of vmamba_nano is runs/quickstart, else a "
        "nano model that is trained for 20 s)",
    )
    add("--pretrained", action="store_true", help="timm's weights for models without a checkpoint, downloaded")
    add("--preset", choices=PRESETS, help="models, size and number of images of a published figure")
    cli.add_weights_arguments(parser)
    cli.add_images_argument(parser, default="digits")
    add("--size", type=int, help="side of the images in pixels (128)")
    add("--num", type=int, help="images drawn at random (50)")
    add("--seed", type=int, default=0, help="of that draw (%(default)s)")
    cli.add_out_argument(parser, "erf.png", "PNG to write")
    cli.add_device_argument(parser)
    cli.add_range_argument(parser)
    args = parser.parse_args(argv)
    models, size, num = PRESETS.get(args.preset, (None, 128, 50))
    args.model = args.model or models
    args.size = size if args.size is None else args.size
    args.num = num if args.num is None else args.num
    return cli.start("erf", args)


if __name__ == "__main__":
    sys.exit(main())
