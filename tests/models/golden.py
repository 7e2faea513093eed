"""Recorded numbers of the official models: the rule that fills the weights, and the comparison.

Weights are a function of their name alone (fill rule v1): entry `name` draws once from PCG64 seeded with the first 8
bytes of sha256(name), and what is drawn is shaped by the kind of parameter. The input is PCG64(1234).
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent.parent / "data" / "vmamba"


def golden(name: str) -> dict:
    return json.loads((DATA / "goldens" / f"{name}.json").read_text())


def manifest(name: str) -> dict:
    return json.loads((DATA / "keys" / f"{name}.json").read_text())


def goldens() -> list[str]:
    return sorted(path.stem for path in (DATA / "goldens").glob("*.json"))


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of a floating-point entry."""
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")))
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("dt_bias", "dt_projs_bias") or name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        dt = np.exp(rng.random(shape) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
    n = rng.standard_normal(shape)
    if leaf in ("A_log", "A_logs", "A_b_log"):
        value = np.log(np.arange(1, shape[-1] + 1)) + 0.02 * n
    elif leaf in ("D", "Ds", "D_b"):
        value = 1 + 0.02 * n
    elif leaf == "running_var":
        value = 1 + 0.1 * np.abs(n)
    elif leaf == "running_mean":
        value = 0.02 * n
    elif leaf in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
        value = 0.2 * n
    elif len(shape) >= 2:
        stacked = leaf in ("x_proj_weight", "dt_projs_weight")
        value = n / math.sqrt(shape[-1] if stacked else math.prod(shape[1:]))
    else:
        value = 1 + 0.1 * n if leaf in ("weight", "gamma") else 0.1 * n
    return value.astype(np.float32)


def filled(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(fill(name, tuple(shape))) for name, shape in shapes.items()}


def fill_model(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every floating-point entry of the state dict but tables of rotary positions; returns it in eval mode."""
    own = model.state_dict().items()
    shapes = {n: v.shape for n, v in own if v.is_floating_point() and not n.endswith(("freqs_cos", "freqs_sin"))}
    model.load_state_dict(filled(shapes), strict=False)
    return model.eval()


def image(shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(1234)).standard_normal(shape).astype(np.float32))


def probe(x: torch.Tensor) -> float:
    """Dot product with fixed noise; unlike a norm it sees permutations."""
    flat = x.detach().double().contiguous().numpy().ravel()
    return float(flat @ np.random.Generator(np.random.PCG64(99)).standard_normal(flat.size))


def assert_matches(x: torch.Tensor, want: dict, tolerance: float, what: str) -> None:
    """Mean, std, L2 norm and probe of a tensor, each relative to the L2 norm (mean and std: to the rms)."""
    assert list(x.shape) == want["shape"], what
    a = x.detach().double()
    rms = want["l2"] / math.sqrt(a.numel())
    assert abs(float(a.mean()) - want["mean"]) <= tolerance * rms, f"{what}: mean"
    assert abs(float(a.std(correction=0)) - want["std"]) <= tolerance * rms, f"{what}: std"
    assert abs(float(a.norm()) - want["l2"]) <= tolerance * want["l2"], f"{what}: l2"
    assert abs(probe(x) - want["probe"]) <= tolerance * want["l2"], f"{what}: probe"
