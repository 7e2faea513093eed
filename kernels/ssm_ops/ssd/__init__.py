from .api import ssd_chunk_scan

__all__ = ["ssd_chunk_scan"]
