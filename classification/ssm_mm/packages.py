"""Whether the OpenMMLab packages are there, with the operators of mmcv."""

from importlib import metadata

from ssm_train.common.errors import UserError

# mmdet and mmsegmentation refuse mmcv 2.2; see requirements-dense.txt
_TESTED = {"mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0", "mmsegmentation": "1.2.2"}


def require(*packages: str) -> None:
    """UserError unless `packages` are installed, before mmengine would try to install them by itself."""
    for package in ("mmengine", "mmcv", *packages):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"{package} {_TESTED[package]} is not installed in this environment: run `bash install_dense.sh` and "
                "use .venv/bin/python"
            ) from None
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"mmcv {metadata.version('mmcv')} has no working operators ({error}): run `bash install_dense.sh`"
        ) from error
