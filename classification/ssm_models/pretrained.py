"""`pretrained=True`: timm's way of building a model, with the authors' files read as data.

timm would give them to `torch.load`, which refuses what they pickle beside the weights (yacs nodes, namespaces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from .checkpoint import describe_difference, find_weights
from .unpickle import CheckpointError
from .weights import Entry, fetch, table

FilterFn = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


class _Shared:
    """Weights on their way through timm's configs, which it copies with the values of all dictionaries in them: that
    would take the memory of a model once more."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def pretrained_cfgs(models: Iterable[str], cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """timm's configs of models, MODEL.TAG by MODEL.TAG, for `generate_default_cfgs`; one without weights and tag where
    none are published. `cfg` is what they share."""
    found = {}
    for model in models:
        found |= {entry.name: {**cfg, "url": entry.url} for entry in table.of_model(model).values()} or {
            model: dict(cfg)
        }
    return found


def build_model(
    cls: type[nn.Module], variant: str, pretrained: bool, pretrained_filter_fn: FilterFn | None = None, **kwargs: Any
) -> nn.Module:
    """timm's `build_model_with_cfg`. Files of the table are fetched, checked, read without executing anything, and must
    fit but for the classifier of other classes and the first convolution of other channels, which timm adapts; so must
    a file that the user names (`pretrained_cfg_overlay=dict(file=...)`).

    Raises:
        CheckpointError: the file cannot be had, or does not fit.
    """
    source = _source(variant, kwargs) if pretrained else None
    if source is None:
        return build_model_with_cfg(cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
    entry = source if isinstance(source, Entry) else None
    weights = find_weights(fetch(entry, kwargs.get("cache_dir")), entry.entry) if entry else find_weights(source)
    shared = {"state_dict": {"shared": _Shared(weights.tensors)}}
    kwargs["pretrained_cfg_overlay"] = (kwargs.get("pretrained_cfg_overlay") or {}) | shared

    def checked(given: dict[str, _Shared], model: nn.Module) -> dict[str, Tensor]:
        found = given["shared"].tensors
        found = pretrained_filter_fn(found, model) if pretrained_filter_fn else found
        adapted = tuple(f"{name}." for name in _adapted(model))
        pair = ({n: v for n, v in names.items() if not n.startswith(adapted)} for names in (found, model.state_dict()))
        difference = describe_difference(*pair)
        if difference:
            raise CheckpointError(
                f"{entry.name if entry else source} does not fit this {type(model).__name__}: {difference}"
            )
        return found

    model = build_model_with_cfg(cls, variant, pretrained, pretrained_filter_fn=checked, **kwargs)
    for part in (model, getattr(model, "model", None)):
        cfg = getattr(part, "pretrained_cfg", {})
        # timm keeps what it was given, weights included
        cfg.pop("state_dict", None)
        if entry:
            # of the weights, not of the architecture: a user's own training has neither
            cfg |= {"license": entry.licence, "origin_url": entry.source}
    return model


def _adapted(model: nn.Module) -> list[str]:
    """Layers that timm fits to other classes and channels."""
    cfg = model.pretrained_cfg
    return [name for name in (cfg.get("classifier"), cfg.get("first_conv")) if name]


def _source(variant: str, kwargs: Mapping[str, Any]) -> Entry | Path | None:
    """The table's entry, or the user's file, that timm would load; None where the user names another source."""
    cfg: PretrainedCfg = resolve_pretrained_cfg(
        variant,
        pretrained_cfg=kwargs.get("pretrained_cfg"),
        pretrained_cfg_overlay=kwargs.get("pretrained_cfg_overlay"),
    )
    if cfg.state_dict or cfg.source in ("hf-hub", "local-dir"):
        return None
    if cfg.file:
        return Path(cfg.file)
    if cfg.hf_hub_id:
        return None
    return table.of_address(cfg.url) if cfg.url else None
