"""The tiny run of the trainer's own tests, to be damaged."""

from ..classification.conftest import cli, fails, image_tree, one_thread, own_tree, tiny_cfg  # noqa: F401
