"""Today's `forward_type` for every name that versions of VMamba's original code have understood."""

from __future__ import annotations

import re

from ..layers.forward_type import OUT_NORMS

# Former names of today's bases.
_FORMER_BASES = {"v0_seq": "v0seq", "v1": "v2", "v31d": "v051d", "v32d": "v052d", "v32dc": "v052dc"}
_BASE = re.compile(r"(v0_seq|v31d|v32dc|v32d|v1|v2|v3|v4|v0[1-5])(?![0-9])(.*)")
# In February and March 2024 postfixes had no underscore: "v2softmaxnozact", "v05nozoact".
_FORMER_POSTFIXES = re.compile(rf"({'|'.join(OUT_NORMS)})?(nozact|noz)?(oact)?(no32)?")

# xv mixers of before May 2024, and today's nearest. Their B and C were not re-ordered, among other differences.
_FORMER_XV = {
    "xv1": "xv1a",
    "xv2": "xv2a",
    "xv3": "xv3a",
    "xv4": "xv3a_act",
    "xv5": "xv2a_act",
    "xv6": "xv1a_act",
    "xv61": "xv1a_act",
    "xv7": "xv1a_act_mul",
}
_XV_POSTFIXES = tuple(f"_on{norm}" for norm in OUT_NORMS) + ("_mul", "_act")
_XV_CONV_POSTFIXES = ("_ca", "_ca1", "_ocov2", "_ocov", "_cpos")


def present_forward_type(name: str, has_conv: bool = True, softmax: bool = False) -> str:
    """A name as today's grammar has it; one that no version knew is returned as it is, for the grammar to refuse.

    Args:
        name: a present or former name.
        has_conv: whether the mixer has a depthwise convolution; without one, xv names say nothing about it.
        softmax: upstream's former argument `softmax_version`, today the postfix _onsoftmax.

    Raises:
        ValueError: a former xv mixer that no present one equals; the nearest is named.
    """
    if name in _FORMER_XV:
        raise ValueError(
            f"forward_type={name!r} was replaced in the original code by one that computes something else; "
            f"the nearest is {_FORMER_XV[name]!r}"
        )
    if name.startswith("xv"):
        return _xv_as_read(name, has_conv)
    found = _BASE.fullmatch(name)
    if found is None:
        return name
    base, rest = found.groups()
    former = _FORMER_POSTFIXES.fullmatch(rest)
    if former is not None:
        rest = "".join(mark + part for mark, part in zip(("_on", "_", "_", "_"), former.groups(), strict=True) if part)
    if softmax and not rest.startswith("_onsoftmax"):
        rest = "_onsoftmax" + rest
    return _FORMER_BASES.get(base, base) + rest


def _xv_as_read(name: str, has_conv: bool) -> str:
    """What upstream computes for an xv name: it looks for one postfix after the other at the end of what is left, in a
    fixed order, and overlooks those that are not where it looks."""
    postfixes = _XV_POSTFIXES + _XV_CONV_POSTFIXES
    mode, *parts = name.split("_")
    if any("_" + part not in postfixes for part in parts):
        return name
    read = ""
    for postfix in postfixes if has_conv else _XV_POSTFIXES:
        if name.endswith(postfix):
            name = name.removesuffix(postfix)
            read = postfix + read
    return mode + read
