"""Which release of this package is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["installed_version"]


def installed_version() -> str | None:
    """Its version; None where it runs from its sources, without having been installed."""
    try:
        return version("pactown-runner")
    except PackageNotFoundError:
        return None
