"""The tiny run of the trainer's own tests, to be damaged."""

from ..classification.conftest import cli, fails, image_tree, one_thread, tiny_cfg  # noqa: F401
