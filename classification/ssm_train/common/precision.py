"""bf16, fp16 or neither."""

import torch

from ssm_train.common.errors import UserError


def resolve_amp(amp: str, device: torch.device) -> str:
    """The config's AMP with "auto" decided: bf16 where the GPU has it, else fp16; off on the CPU.

    Raises UserError where the device cannot compute in the precision asked for.
    """
    if device.type != "cuda":
        return "off" if amp == "auto" else amp
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if amp == "bf16" and not has_bf16:
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16: use --amp fp16 or --amp off")
    if amp == "auto":
        return "bf16" if has_bf16 else "fp16"
    return amp


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The precision context of forward passes; `amp` is bf16, fp16 or off."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
