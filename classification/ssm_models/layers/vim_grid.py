"""Published state dicts of Vim, brought to the grid of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .pos_embed import class_token_rows, grid_with, resize_pos_embed

CLS_TOKENS = ("cls_token", "cls_token_head", "cls_token_tail")


def bring_to_grid(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    grids: Sequence[tuple[int, int]],
    legacy_pos_embed: bool = False,
) -> dict[str, Tensor]:
    """Bring a published state dict to the grid of `model`, a VisionMamba; one in this form stays as it is.

    The position embedding is resized, rows of class tokens apart; tables of rotary positions are the model's own. A
    model with neither class tokens nor classifier, a backbone, drops the tokens and their rows, and brings the tables
    itself. Other differences are left to the strict loading.

    Args:
        grids: what the position embedding may be of, the likeliest first; a square one need not be named.
        legacy_pos_embed: resize as the original code did: the first row stays, whatever it belongs to, and the others,
            the middle class token's included, count as the grid. Published stride-8 models were trained from that.
    """
    own = model.state_dict()
    converted = dict(state_dict)
    backbone = "head.weight" not in own and not model.class_tokens()
    # computed, as a model on the meta device has none
    names = ("rope.freqs_cos", "rope.freqs_sin")
    tables = {} if model.rope is None else dict(zip(names, model.rope.tables(*model.grid), strict=True))
    for name, table in tables.items():
        # published detectors and segmentors rotate, the classifiers that they start from do not
        if backbone or name in converted:
            same = name in converted and converted[name].shape == table.shape
            if not (same and grid_with(len(table), grids) == model.grid):
                converted[name] = table.to(own[name].dtype)
    tokens, kept = sum(name in converted for name in CLS_TOKENS), len(model.class_tokens())
    if not kept and "head.weight" not in own:
        converted = {name: value for name, value in converted.items() if name not in CLS_TOKENS}
    elif tokens != kept:
        return converted
    pos_embed = converted.get("pos_embed")
    if pos_embed is None or "pos_embed" not in own:
        return converted
    patches, wanted = pos_embed.shape[1] - tokens, math.prod(model.grid)
    old_grid = grid_with(patches, grids)
    if old_grid is None:
        raise ValueError(
            f"pos_embed of {pos_embed.shape[1]} rows has {patches} beside {tokens} class tokens: neither the {wanted} "
            f"of a {model.grid[0]}x{model.grid[1]} grid nor those of a square one"
        )
    if tokens == kept and old_grid == model.grid:
        return converted
    if legacy_pos_embed:
        old_rows, new_rows = range(tokens), range(kept)
    else:
        old_rows = class_token_rows({0: "none", 1: model.published_mode, 2: "double"}[tokens], patches)
        new_rows = class_token_rows(model._resting_mode(), wanted)
    converted["pos_embed"] = resize_pos_embed(pos_embed, old_grid, model.grid, tuple(old_rows), tuple(new_rows))
    return converted
