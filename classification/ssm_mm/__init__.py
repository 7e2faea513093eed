"""What detection and segmentation share: command lines, safe checkpoints, data checks, and scenes of digits.

`custom_imports = dict(imports=["ssm_mm"])` in a config of MMEngine makes the backbones known to it; where MMEngine is
not installed, what needs it says so.
"""

from importlib.util import find_spec

if find_spec("mmengine") is not None:
    from ssm_mm import registration as registration
