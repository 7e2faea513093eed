"""Learning rates that fall from layer to layer towards the image, as an optimizer constructor of mmengine."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn


class LayerDecay(DefaultOptimWrapperConstructor):
    """mmengine's default, with the rates of a backbone's layer i of n scaled by decay_rate ** (n - i).

    What comes before the layers (stem, position embedding) has decay_rate ** (n + 1), what comes after them (norms,
    necks, heads) 1. So do ViTDet and BEiT. Layers are the entries of `backbone.layers`: blocks of Vim, stages of VMamba
    and VSSD.

    Config keys: those of mmengine's `paramwise_cfg`, and
        decay_rate: above 0, at most 1.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get("decay_rate")
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg.decay_rate={rate} of LayerDecay must be a number above 0, at most 1")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs) -> None:
        """mmengine's recursion; the groups, one per parameter, are scaled when it has come back to the whole model."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        depth = module.backbone.total_layers
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for group in params:
            distance = depth + 1 - layer_of(names[id(group["params"][0])], depth)
            group["lr"] = group.get("lr", self.base_lr) * self.paramwise_cfg["decay_rate"] ** distance


def layer_of(name: str, depth: int) -> int:
    """0 before the layers, i + 1 in layer i, depth + 1 after them and outside the backbone.

    Args:
        name: of a parameter, "backbone.layers.3.mixer.D".
        depth: layers of the whole model of which the backbone is made, whatever the maps need of it.
    """
    owner, _, rest = name.partition(".")
    part, _, rest = rest.partition(".")
    if owner == "backbone" and part == "layers":
        return int(rest.split(".")[0]) + 1
    if owner == "backbone" and part in ("patch_embed", "pos_embed"):
        return 0
    return depth + 1
