"""The published names of SS2D variants ("v05_noz") and what they mean.

A name is ``<base>[_on<norm>][_nozact][_noz][_oact][_no32]``, in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

OUT_NORMS = ("none", "dwconv3", "cnorm", "softmax", "sigmoid")

# base: (routes, are the inputs of the scan cast to float32?)
_BASES = {
    "v01": ("cross2d", True),
    "v02": ("cross2d", True),
    "v03": ("cross2d", True),
    "v04": ("cross2d", False),
    "v05": ("cross2d", False),
    "v051d": ("unidi", False),
    "v052d": ("bidi", False),
    "v052dc": ("cascade2d", False),
    "v2": ("cross2d", True),
    "v3": ("cross2d", False),
    "v4": ("cross2d", False),
}

# The form of the first checkpoints: always gated, with nothing to choose.
_V0 = ("v0", "v0seq")


@dataclass(frozen=True)
class ForwardType:
    """What a variant of SS2D does; the bases differ in speed and precision upstream, here only in what is listed."""

    scans: str = "cross2d"
    """Routes: "cross2d", "unidi", "bidi", or "cascade2d" (rows, then columns)."""
    scan_fp32: bool = False
    """Feed the scan in float32 whatever autocast says."""
    gate: bool = True
    """Multiply the output by a gate made from the input."""
    gate_act: bool = True
    """Activate the gate."""
    out_act: bool = False
    """GELU after the out norm."""
    out_norm: str = "ln"
    """"ln" or one of `OUT_NORMS`."""
    fixed: bool = False
    """SiLU, 3x3 convolution with bias and Mamba's initial values are part of the variant (v0)."""


def parse_forward_type(name: str) -> ForwardType:
    """Read a published name.

    Raises:
        ValueError: an unknown base or postfix, or postfixes in another order.
    """
    if name in _V0:
        return ForwardType(scan_fp32=True, fixed=True)
    rest = name
    found = {}
    for postfix in ("_no32", "_oact", "_noz", "_nozact"):
        found[postfix] = rest.endswith(postfix)
        rest = rest.removesuffix(postfix)
    out_norm = next((n for n in OUT_NORMS if rest.endswith(f"_on{n}")), "ln")
    rest = rest.removesuffix(f"_on{out_norm}")
    if rest not in _BASES or (found["_noz"] and found["_nozact"]):
        raise ValueError(
            f"forward_type={name!r} is not known. Legal: {', '.join(_V0)}, or a base of {', '.join(_BASES)}, "
            f"then in this order at most one of {', '.join('_on' + n for n in OUT_NORMS)}, one of _nozact, _noz, "
            f"then _oact, _no32"
        )
    scans, scan_fp32 = _BASES[rest]
    return ForwardType(
        scans=scans,
        scan_fp32=scan_fp32 and not found["_no32"],
        gate=not found["_noz"],
        gate_act=not found["_nozact"],
        out_act=found["_oact"],
        out_norm=out_norm,
    )
