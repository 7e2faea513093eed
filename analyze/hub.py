"""A folder as model hubs expect it, of a run or of published weights: config.json, model.safetensors, README.md.

timm and transformers read it where it lies (`local-dir:FOLDER`) and from the Hugging Face Hub; docs/hubs.md tells how.
The card says what the run or the authors measured, how images are prepared, and has code that runs.

examples:
  python analyze/hub.py
  python analyze/hub.py --checkpoint runs/quickstart --repo ME/digits --license mit --out runs/hub/digits
  python analyze/hub.py --checkpoint vmamba_tiny_s1l8.in1k --out runs/hub/vmamba_tiny_s1l8

FOLDER must be new or empty; it is written whole or not at all. `hf upload ME/digits runs/hub/digits` publishes it.
"""

import sys
from pathlib import Path

from analyze import cli


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = cli.command_line("hub.py", __doc__)
    add = parser.add_argument
    cli.add_model_arguments(parser)
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one per line (those of the run's data)")
    add("--license", metavar="ID", help="the hub's name of your licence, e.g. mit (unknown; not for published weights)")
    add("--repo", metavar="USER/NAME", help="what it will be called on the hub, for the code in the card")
    default = cli.OUT / "hub"
    add("--out", type=Path, default=default, metavar="FOLDER", help="new or empty (%(default)s)")
    return cli.start("hub", parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
