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
        ValueError: The package is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.split(".")[0]
        raise ValueError(f"{feature} needs a package: pip install {package}") from None


def installed_version(package: str) -> str:
    """Return the version of a package, or "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
