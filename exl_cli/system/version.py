"""Versions of installed packages, exl's among them."""

from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed_version() -> str:
    """The version of exl, or "0+unknown" for a source tree that was never installed."""
    return package_version("exl-cli") or "0+unknown"
