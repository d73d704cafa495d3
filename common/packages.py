"""Optional packages."""

import importlib


def optional(module: str, what: str, package: str = ""):
    """Imports an optional package. Raises ValueError that tells how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = package or module.split(".")[0]
        raise ValueError(f"{what} needs a package: pip install {package}") from None
