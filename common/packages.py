"""Packages that only some features need."""

import importlib
import importlib.metadata
from types import ModuleType


def optional(module: str, feature: str, package: str = "") -> ModuleType:
    """Import an optional package.

    Args:
        module: Name of the module, such as `pyarrow.parquet`.
        feature: Name of the feature that needs the package. The error message begins with it.
        package: Name of the package for pip, if it differs from the first part of `module`.

    Returns:
        The imported module.

    Raises:
        ValueError: The package is not installed, and the message says how to install it. Or the
            package cannot be imported, and the message has the reason.
    """
    top = module.split(".")[0]
    package = package or top
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in (top, package):  # torch.utils.tensorboard needs tensorboard
            raise ValueError(_not_importable(feature, package, error)) from None
        raise ValueError(f"{feature} needs a package: pip install {package}") from None
    except ImportError as error:  # for example, a library that the package needs is too old
        raise ValueError(_not_importable(feature, package, error)) from None


def _not_importable(feature: str, package: str, error: ImportError) -> str:
    return f"{feature} needs the package {package}, which cannot be imported: {error}"


def installed_version(package: str) -> str:
    """Return the version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
