from .api import silu_gate

__all__ = ["silu_gate"]
