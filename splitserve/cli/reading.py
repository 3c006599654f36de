"""The model repository that a command reads: a folder or a URL."""

from __future__ import annotations

import os

from splitserve.repository.source import BundleSource
from splitserve.repository.sources import missing, source_of


class NoRepository(Exception):
    """There is no repository at the given place, or this command cannot read it; the message says why."""


def repository_at(where: str) -> BundleSource:
    """The source for a repository; files from a URL go to the services' cache.

    Raises:
        NoRepository: no such folder, or a URL that this installation cannot read.
    """
    if missing(where):
        raise NoRepository(f"{where}: no such folder")
    try:
        return source_of(where, cache=os.environ.get("MODEL_CACHE", ""))
    except ValueError as error:
        raise NoRepository(str(error)) from error
