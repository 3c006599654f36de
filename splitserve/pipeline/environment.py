"""Whether what is installed is what a lock says."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def differences(requirements: Iterable[str]) -> list[str]:
    """What is missing or has another version than the lock's, e.g. ``"numpy 2.4.5 instead of ==2.4.6"``.

    Lines whose markers are for other environments are left out; all of them, where the package ``packaging`` is not installed.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return []
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"no {requirement.name}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name} {version} instead of {requirement.specifier}")
    return found
