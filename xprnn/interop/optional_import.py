"""Import of optional packages, with an error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from xprnn.arrays.namespace import InputError

__all__ = [
    "require_package",
]


def require_package(where: str, package: str, extra: str, *modules: str) -> Any:
    """Import an optional package and the named submodules, and return the package.

    Raises:
        InputError: the package is not installed; the message names the extra to install.
    """
    try:
        for name in modules:
            import_module(f"{package}.{name}")
        return import_module(package)
    except ImportError:
        raise InputError(f'{where}: needs {package}: pip install ".[{extra}]" in the clone of xprnn') from None
