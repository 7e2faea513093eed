from .api import cross_merge, cross_scan

__all__ = ["cross_merge", "cross_scan"]
