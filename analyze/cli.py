"""What the command lines of this folder have in common: one vocabulary of options, help with examples, where files go,
and what is said at the end.

Commands parse before they import: of the folder's modules a command takes only this one at its top, which needs nothing
but the standard library, and what computes, in impl/, once the options are known. So `--help` comes at once.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

OUT = Path("runs/analyze")
"""Where commands write without --out; ignored by git."""


def command_line(script: str, doc: str) -> argparse.ArgumentParser:
    """The parser of analyze/`script`; its help is the docstring `doc`: a first line, and what follows as it stands."""
    what, _, rest = doc.partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"analyze/{script}", description=what, epilog=rest, formatter_class=form)


def start(name: str, args: argparse.Namespace) -> int:
    """Do the work of a command, analyze/impl/`name`, as `ssm_train.common.command.run` does; then say on stderr what it
    took. Returns the exit status."""
    started = time.monotonic()
    from ssm_train.common.command import run  # imports PyTorch, which --help need not wait for

    status = run(lambda: importlib.import_module(f"analyze.impl.{name}").command(args))
    if status == 0:
        print(f"took {time.monotonic() - started:.1f} s", file=sys.stderr)
    return status


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --checkpoint and what goes with it, for `inputs.load_model`."""
    parser.add_argument("--model", metavar="NAME", help="of timm's registry; runs of this repository know theirs")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="P",
        help="run or checkpoint folder, .safetensors, .pth, or a published name (without --model: runs/quickstart, "
        "else a nano model that is trained for 20 s)",
    )
    add_weights_arguments(parser)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """--which and --allow-nonfinite, for `inputs.load_model`."""
    parser.add_argument(
        "--which",
        choices=("auto", "model", "ema"),
        default="auto",
        help="plain or averaged weights (the better ones, or those that a name is published for)",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights with nan or infinity, too")


def add_images_argument(parser: argparse.ArgumentParser, *aliases: str, default: str) -> None:
    """--images, any number of files and folders; `default` says what is taken without it."""
    names = ("--images", *aliases)
    parser.add_argument(*names, type=Path, nargs="+", metavar="PATH", help=f"images or folders ({default})")


def add_out_argument(parser: argparse.ArgumentParser, name: str, beside: str) -> None:
    """--out, a file; `beside` says what else is written."""
    default = OUT / name
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help=f"{beside} (%(default)s)")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="", help="cuda or cpu; cuda where there is one")


def add_range_argument(parser: argparse.ArgumentParser) -> None:
    """--range, for `image_files.image_decoder`."""
    parser.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values of black and white in images of more than 8 bits (the run's DATA.RANGE)",
    )


def comma_list(text: str) -> list[str]:
    return text.split(",")
