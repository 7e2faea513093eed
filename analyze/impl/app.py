"""The command analyze/app.py: which models and images can be chosen on the page of app_page.py."""

import argparse
import os
import tempfile
from pathlib import Path

from analyze import inputs
from analyze.impl import app_views as views
from analyze.quick import digit_images, quick_run, say
from ssm_train.common.errors import UserError


def choices_of(args: argparse.Namespace) -> dict[str, views.Shown]:
    """The models that can be chosen, by label: those of the command line, then nano models with random weights."""
    device = inputs.find_device(args.device)
    if not args.checkpoint and not args.model:
        args.checkpoint = [str(quick_run())]
        say(f"taking --checkpoint {args.checkpoint[0]}")
    names = args.model or [None] * len(args.checkpoint)
    checkpoints = [Path(path) for path in args.checkpoint] or [None] * len(names)
    if len(names) != len(checkpoints):
        raise UserError(f"--model: {len(names)} for {len(checkpoints)} --checkpoint, but each needs its own")
    jobs = [*zip(names, checkpoints, strict=True), *((name, None) for name in views.NANO)]
    found = [views.load(name, checkpoint, device, args) for name, checkpoint in jobs]
    return {shown.label: shown for shown in found}


def examples() -> dict[str, Path]:
    """Images that come with scikit-learn, by file name: a digit and two photographs."""
    from sklearn.datasets import load_sample_images  # takes a second

    paths = [*digit_images(1), *map(Path, load_sample_images().filenames)]
    return {path.name: path.absolute() for path in paths}


def command(args: argparse.Namespace) -> None:
    """The command: serves the page until Ctrl-C. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="ssm-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "served")  # uploads, and copies of the figures
        try:
            from analyze.impl.app_page import build, launch
        except ImportError as error:
            raise UserError(f"the page needs gradio: pip install -r requirements-web.txt ({error})") from error
        launch(build(choices_of(args), examples(), Path(folder, "figures")), args.host, args.port)
