from .api import add_norm

__all__ = ["add_norm"]
