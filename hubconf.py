"""torch.hub's way to the zoo: an entry point per model.

    torch.hub.load(FOLDER, "vmamba_tiny_s1l8", source="local", pretrained=True)    FOLDER: a clone of this repository

The packages of the clone must be installed: a clone alone has no compiled operators, and nobody could check its GPU
kernels on the device. Entry points say with which command. What a name is made of is data, weights/zoo.json, so that
nothing but the standard library is imported before a model is asked for.
"""

import json
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

dependencies = ["torch"]  # the others come with the installation, whose absence an entry point explains better

_ROOT = _Path(__file__).resolve().parent
_ZOO = _ROOT / "classification" / "ssm_models" / "weights"
_LIBRARIES = ("ssm_ops", "ssm_models")


def _entry(name, cost, weights):
    """The entry point of a model."""

    def create(pretrained=False, **kwargs):
        if not all(map(_find_spec, _LIBRARIES)):
            raise RuntimeError(
                f"{name} needs ssm_ops and ssm_models, which are not installed: "
                f"pip install setuptools torch torchvision && pip install --no-build-isolation {_ROOT}"
            )
        import timm

        import ssm_models  # noqa: F401  registers the names

        return timm.create_model(name, pretrained=pretrained, **kwargs)

    tags = [row["name"].removeprefix(f"{name}.") for row in weights]
    published = [f"{row['name']} (top-1 {row['metrics']['top1']}, {row['licence'] or 'no licence'})" for row in weights]
    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"{name}: {cost['parameters'] / 1e6:.1f} M parameters, {cost['macs'] / 1e9:.2f} G multiply-accumulates.\n\n"
        f"Args:\n"
        f"    pretrained: the first of the published weights: {', '.join(published) or 'there are none'}.\n"
        f"    **kwargs: timm.create_model's (num_classes, features_only, ...) and the model's own; unknown ones raise."
    )
    if len(tags) > 1:
        create.__doc__ += f"\n        pretrained_cfg takes other weights: {', '.join(map(repr, tags[1:]))}."
    return create


def _entries():
    costs, table = (json.loads((_ZOO / f"{name}.json").read_text()) for name in ("zoo", "table"))
    return {name: _entry(name, cost, [row for row in table if row["model"] == name]) for name, cost in costs.items()}


globals().update(_entries())
