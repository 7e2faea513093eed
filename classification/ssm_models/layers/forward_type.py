"""The published names of VMamba's mixers ("v05_noz") and what they mean.

Three families, told apart by how a name begins:

    v...  ``<base>[_on<norm>][_nozact|_noz][_oact][_no32]``, base one of `BASES`; or v0, v0seq alone: `SS2D`
    m...  ``m0`` with the same postfixes: `SS2DM0`
    xv... ``xv1a|xv2a|xv3a [_cpos|[_ocov][_ocov2]] [_ca|_ca1] [_act] [_mul] [_on<norm>]``, without blanks: `SS2DXv`

The order of the postfixes is part of the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OUT_NORMS = ("none", "dwconv3", "cnorm", "softmax", "sigmoid")

# base: (routes, are the inputs of the scan cast to float32?)
BASES = {
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

_ON = rf"(?:_on(?P<norm>{'|'.join(OUT_NORMS)}))?"
_POSTFIXES = rf"{_ON}(?P<gate>_nozact|_noz)?(?P<oact>_oact)?(?P<no32>_no32)?"
_V_NAME = re.compile(rf"(?P<base>{'|'.join(BASES)}){_POSTFIXES}")
_M0_NAME = re.compile(rf"m0{_POSTFIXES}")
_XV_NAME = re.compile(
    r"xv(?P<mode>[123])a(?:_cpos|(?P<ocov>_ocov)?(?P<ocov2>_ocov2)?)(?P<conv_act>_ca1?)?(?P<act>_act)?(?P<mul>_mul)?"
    + _ON
)

_LEGAL_ON = f"at most one of {', '.join('_on' + n for n in OUT_NORMS)}"
_LEGAL = (
    f"{', '.join(_V0)}, or a base of {', '.join(BASES)}, then in this order {_LEGAL_ON}, one of _nozact, _noz, then "
    f"_oact, _no32 (SS2D); m0 with the same (SS2DM0); or xv1a, xv2a, xv3a, then in this order _cpos or _ocov, _ocov2, "
    f"one of _ca, _ca1, then _act, _mul, {_LEGAL_ON} (SS2DXv)"
)


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


@dataclass(frozen=True)
class XvForwardType:
    """What a variant of the xv mixer does."""

    dt: str
    """Step sizes are made from: "shared" R channels of all routes (xv1a), "routed" R of each (xv3a), or are "given", D
    channels of all routes (xv2a)."""
    in_conv: bool = True
    """Depthwise convolution of the input of in_proj. _cpos, which was meant to add the input again, says the same."""
    proj_conv: bool = False
    """Depthwise convolution of everything in_proj gives (_ocov2)."""
    out_conv: bool = False
    """Add a depthwise convolution of what is scanned (_ocov)."""
    conv_act: str | None = None
    """Activation after in_conv and out_conv: "silu" (_ca) or "gelu" (_ca1)."""
    out_act: bool = False
    """GELU after the out norm."""
    mul: bool = False
    """Multiply by what is scanned."""
    out_norm: str = "ln"
    """"ln" or one of `OUT_NORMS`."""


def mixer_family(name: str) -> str:
    """Which of the three grammars a name is to be read by: "xv", "m0" or "v"."""
    return "xv" if name.startswith("xv") else "m0" if name.startswith("m") else "v"


def parse_forward_type(name: str) -> ForwardType:
    """Read a name of `SS2D`.

    Raises:
        ValueError: an unknown base or postfix, or postfixes in another order.
    """
    if name in _V0:
        return ForwardType(scan_fp32=True, fixed=True)
    found = _match(_V_NAME, name)
    scans, scan_fp32 = BASES[found["base"]]
    return _forward_type(found, scans=scans, scan_fp32=scan_fp32 and not found["no32"])


def parse_m0(name: str) -> ForwardType:
    """Read a name of `SS2DM0`; raises as `parse_forward_type`."""
    return _forward_type(_match(_M0_NAME, name))


def parse_xv(name: str) -> XvForwardType:
    """Read a name of `SS2DXv`; raises as `parse_forward_type`."""
    found = _match(_XV_NAME, name)
    return XvForwardType(
        dt={"1": "shared", "2": "given", "3": "routed"}[found["mode"]],
        in_conv=not (found["ocov"] or found["ocov2"]),
        proj_conv=bool(found["ocov2"]),
        out_conv=bool(found["ocov"]),
        conv_act={None: None, "_ca": "silu", "_ca1": "gelu"}[found["conv_act"]],
        out_act=bool(found["act"]),
        mul=bool(found["mul"]),
        out_norm=found["norm"] or "ln",
    )


def _match(pattern: re.Pattern, name: str) -> re.Match:
    found = pattern.fullmatch(name)
    if found is None:
        raise ValueError(f"forward_type={name!r} is not known. Legal: {_LEGAL}")
    return found


def _forward_type(found: re.Match, **of_base) -> ForwardType:
    return ForwardType(
        **of_base,
        gate=found["gate"] != "_noz",
        gate_act=found["gate"] != "_nozact",
        out_act=bool(found["oact"]),
        out_norm=found["norm"] or "ln",
    )
