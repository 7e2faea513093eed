from .api import nc_ssd

__all__ = ["nc_ssd"]
