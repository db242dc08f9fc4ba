"""Versions of installed packages, including exl's."""

from functools import cache


def package_version(name: str) -> str | None:
    """An installed distribution's version, or None."""
    # It takes a tenth of the time that the whole command line takes to import.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def installed_version() -> str:
    """exl's version; "0+unknown" when run from a source tree that was never installed."""
    # Looking it up takes a millisecond, and each response of the server names it.
    return package_version("exl-cli") or "0+unknown"
