"""Model repositories that can be written: a folder, or a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from splitserve.repository.bundle import Bundle, BundleKey
from splitserve.repository.folder import Repository
from splitserve.repository.manifest import Kind, Manifest
from splitserve.repository.release import Release, ReleaseKey
from splitserve.repository.release_log import MakeRecord
from splitserve.repository.source import BundleSource
from splitserve.repository.sources import MLFLOW, check, is_url


class WritableRepository(BundleSource, Protocol):
    """A model repository to which bundles and releases are published."""

    def next_version(self, model: str, kind: Kind) -> int:
        """The number after the highest one published.

        Raises:
            BundleError: there is none, or the repository cannot be listed.
        """
        ...

    def write(self, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """Publish a bundle: no reader sees a part of one.

        Args:
            manifest: its ``files`` are filled in here.
            files: contents by name.

        Raises:
            AlreadyPublished: the version exists.
            BundleError: it is no version number, or the repository cannot be written.
        """
        ...

    def remove(self, key: BundleKey) -> None:
        """Undo `write`. Only for a bundle that has not been served."""
        ...

    def publishing(self, model: str) -> AbstractContextManager[None]:
        """Held while a model is published to.

        Raises:
            BundleError: the repository cannot be written.
        """
        ...

    def append(self, model: str, make: MakeRecord) -> Release:
        """Add a record to the releases of a model.

        Raises:
            BundleError: the repository cannot be written.
        """
        ...

    def add_signature(self, key: BundleKey | ReleaseKey, file: Path) -> str | Path:
        """Publish the signature of a bundle or release, which replaces one that is there.

        Args:
            key: of which.
            file: has it; in the folder of what `open` or `open_release` returned.

        Returns:
            Its place.

        Raises:
            BundleError: the repository cannot be written.
        """
        ...

    def add_route_signature(self, model: str, sign: Callable[[Path], Path]) -> str | Path:
        """As `add_signature`, of a model's route. ``sign`` writes it next to the path of the route that it is given."""
        ...

    def place(self, key: BundleKey | ReleaseKey) -> str | Path:
        """The place of a bundle or release, for messages."""
        ...

    def route_place(self, model: str) -> str | Path:
        """The place of a model's route, for messages."""
        ...


def writable(where: str | os.PathLike[str]) -> WritableRepository:
    """The repository in a folder, which need not exist yet, or below a URL of a bucket. Connects when it is first used.

    Raises:
        ValueError: the URL's scheme is unknown, or cannot be written, or its packages are not installed.
    """
    place = os.fspath(where)
    if not is_url(place):
        return Repository(unquote(urlsplit(place).path) if place.startswith("file://") else where)
    if place.startswith(MLFLOW):
        raise ValueError(f"{place} cannot be written: the register step of a training pipeline does that (docs/training.md)")
    check(place)
    if place.startswith(("http://", "https://")):
        raise ValueError(f'{place} cannot be written: publish to a folder, run "splitserve index", and upload it')
    from splitserve.repository.sources.bucket import Bucket

    return Bucket.at(place, cache=os.environ.get("MODEL_CACHE", ""))
