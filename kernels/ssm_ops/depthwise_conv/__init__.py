from .api import depthwise_conv

__all__ = ["depthwise_conv"]
