from .api import SCANS, cross_merge, cross_scan

__all__ = ["SCANS", "cross_merge", "cross_scan"]
