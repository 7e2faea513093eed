from .api import bidirectional_scan

__all__ = ["bidirectional_scan"]
