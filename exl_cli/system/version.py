"""The version of exl that is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The installed distribution's version, or "0+unknown" for a source tree that was never installed."""
    try:
        return version("exl-cli")
    except PackageNotFoundError:
        return "0+unknown"
