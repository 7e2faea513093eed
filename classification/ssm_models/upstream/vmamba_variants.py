"""Configurations of VMamba's original repository that are no models of the zoo: its ablations, and older trainings.

Keys are names of yaml files (ablations), of models in them, or of published weights; values are arguments of `VSSM`.
"""

from __future__ import annotations

from typing import Any

from ..vssm import VARIANTS

_V0 = VARIANTS["vanilla_vmamba_tiny"]
_V2 = VARIANTS["vmamba_tiny_s1l8"]
_NO_CONV = {"ssm_conv": -1}
_A7 = _V2 | _NO_CONV | {"forward_type": "v05", "ssm_d_state": 16}
_FIVE = {"depths": (2, 2, 5, 2)}

_FROM_V0 = {
    "a0": _V0,
    "a0seq": _V0 | {"forward_type": "v0seq"},
    "a01": _V0 | {"forward_type": "v01"},
    "a1": _V0 | {"forward_type": "v02"},
    "a2": _V0 | {"forward_type": "v04"},
    "a3": _V0 | {"forward_type": "v05", "norm_layer": "ln2d"},
    "a7": _A7 | {"depths": (2, 2, 2, 2), "ssm_ratio": 2.0},
    "a7a": _A7 | {"depths": (2, 2, 2, 2)},
    "a8": _A7 | _FIVE,
}
_FROM_V2 = {
    "a9d": _A7 | _FIVE | {"forward_type": "v05_noz"},
    "unidi": _V2 | {"forward_type": "v051d_noz"},
    "unidi_ndw": _V2 | _NO_CONV | {"forward_type": "v051d_noz"},
    "bidi": _V2 | {"forward_type": "v052d_noz"},
    "bidi_ndw": _V2 | _NO_CONV | {"forward_type": "v052d_noz"},
    "cas2d": _V2 | {"forward_type": "v052dc_noz"},
    "cas2d_ndw": _V2 | _NO_CONV | {"forward_type": "v052dc_noz"},
    "ds2": _V2 | _FIVE | {"ssm_d_state": 2, "ssm_ratio": 2.0},
    "ds4": _V2 | _FIVE | {"ssm_d_state": 4, "ssm_ratio": 2.0},
    "ds8": _V2 | _FIVE | {"ssm_d_state": 8, "ssm_ratio": 1.5},
    "ds16": _V2 | _FIVE | {"ssm_d_state": 16, "ssm_ratio": 1.0},
    "sr1l5": _V2 | _FIVE | {"ssm_ratio": 1.0},
    "sr1hl5": _V2 | _FIVE | {"ssm_ratio": 1.5},
    "m2s2h": _V2 | {"mlp_ratio": 2.0, "ssm_ratio": 2.5},
    "m3s1h": _V2 | {"mlp_ratio": 3.0, "ssm_ratio": 1.5},
    "init1": _V2 | {"ssm_init": "v1"},
    "init2": _V2 | {"ssm_init": "v2"},
    "gelu": _V2 | {"ssm_act_layer": "gelu"},
    "relu": _V2 | {"ssm_act_layer": "relu"},
    "ndw": _V2 | _NO_CONV,
    "posndw": _V2 | _NO_CONV | {"posembed": True},
    "ondw": _V2 | {"forward_type": "v05_ondwconv3_noz"},
    "onone": _V2 | {"forward_type": "v05_onnone_noz"},
    "onsoftmax": _V2 | {"forward_type": "v05_onsoftmax_noz"},
}

# February 2024: gated, computed in NHWC.
_NIGHTLY = {"forward_type": "v2", "norm_layer": "ln", "patchembed_version": "v2", "downsample_version": "v2"}
_NIGHTLY |= {"ssm_d_state": 16, "ssm_ratio": 1.2}
_FEBRUARY = {
    "vssm1_tiny": _NIGHTLY | {"depths": (2, 2, 4, 2), "dims": 96, "drop_path_rate": 0.2},
    "vssm1_small": _NIGHTLY | {"depths": (2, 2, 16, 2), "dims": 96, "drop_path_rate": 0.3},
    "vssm1_base": _NIGHTLY | {"depths": (2, 2, 16, 2), "dims": 128, "drop_path_rate": 0.6},
    "vssmtiny_dp02": _V2 | {"forward_type": "v2", "depths": (2, 2, 4, 2), "ssm_ratio": 2.0, "norm_layer": "ln"},
}

FURTHER_VARIANTS: dict[str, dict[str, Any]] = (
    {f"vmambav0_tiny_224_{name}": arguments for name, arguments in _FROM_V0.items()}
    | {f"vmambav2_tiny_224_{name}": arguments for name, arguments in _FROM_V2.items()}
    | _FEBRUARY
)
