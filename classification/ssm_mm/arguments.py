"""The command lines of the tools: stock flags of mmdet and mmsegmentation."""

import argparse
import os

from ssm_train.common.errors import UserError


def train_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("config", help="a file of configs/, or any config of the framework")
    parser.add_argument("--work-dir", help="for logs and checkpoints (work_dirs/<name of the config>)")
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs a GPU)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from this checkpoint, or from the newest readable one of the work folder",
    )
    parser.add_argument(
        "--from-scratch", action="store_true", help="train with random weights, though the backbone names no checkpoint"
    )
    parser.add_argument(
        "--profile", type=int, nargs="?", const=10, metavar="N", help="time N (10) training steps by part, then stop"
    )
    _add_common(parser)
    return parser


def test_parser(prog: str, description: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("config", help="the config that the checkpoint was trained with")
    parser.add_argument("checkpoint", help="weights of the whole model: a file, or a published name")
    add_weights_arguments(parser)
    parser.add_argument("--work-dir", help="for the metrics (work_dirs/<name of the config>)")
    parser.add_argument("--out", help=out)
    parser.add_argument("--show", action="store_true", help="open windows with the predictions")
    parser.add_argument("--show-dir", help="folder for pictures of the predictions (detection: in the work folder)")
    parser.add_argument("--wait-time", type=float, default=2.0, help="of --show, in seconds")
    parser.add_argument("--tta", action="store_true", help="average over flips (segmentation: and scales)")
    _add_common(parser)
    return parser


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes with a checkpoint, see `checkpoints.Options`."""
    parser.add_argument(
        "--which", choices=("auto", "model", "ema"), default="auto", help="plain or averaged weights (averaged)"
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="take weights with nan or infinity, too")


def _add_common(parser: argparse.ArgumentParser) -> None:
    from mmengine.config import DictAction  # when `require` has found it

    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="change values of the config"
    )
    parser.add_argument("--data-root", metavar="DIR", help="where the data set lies, instead of the config's place")
    parser.add_argument("--launcher", default="none", choices=("none", "pytorch", "slurm", "mpi"))
    # torch.distributed.launch passes it, torchrun sets the variable
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with LOCAL_RANK in the environment, where mmengine looks for it."""
    args = parser.parse_args(argv)
    if getattr(args, "profile", None) is not None and args.profile < 1:
        raise UserError(f"--profile {args.profile}: at least one step")
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args
